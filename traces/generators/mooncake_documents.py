"""``mooncake-doc``: fitted to the Mooncake FAST'25 synthetic trace (Apache-2.0): document questions and short chats.

45 % of the requests stand alone; the rest come in groups of 2 to 24 that repeat a document, the replies
not kept. The recorded group sizes are those inside a window of 1,022 s, so windows of that length follow
one another here, each with whole groups: a trace of 3,993 requests is one window, as the recorded one is.
Of eight such traces: block hits without eviction .603-.641 (recorded .640), LRU of 1k/10k blocks
.102-.118/.450-.483 (.083/.424), mean prompt 14.8-16.7k (15.3k), mean output 150-157 (149).
"""

from dataclasses import replace
from random import Random

from traces.generators.contract import GeneratorParameters
from traces.generators.quantile_table import QuantileTable
from traces.generators.session_trace import BlockNumbers, EmittedTurns, Turn, session_trace
from traces.request_trace import Trace

_BLOCK_SIZE = 512
_WINDOW_S = 1022.0
_NUM_SINGLES = 1803
_GROUPS_BY_SIZE = ((2, 75), (3, 66), (4, 60), (5, 45), (6, 55), (7, 32), (8, 25), (9, 15), (10, 35))
_NUM_GROUPS = sum(count for _, count in _GROUPS_BY_SIZE)
# The last class is 10 to 24; its mean is what is left of the 2,190 requests in groups.
_LARGE_GROUP_MEAN, _LARGE_GROUP_MAX = 13.9, 24

# Only the quantiles from 5 to 99 % are known; outer ends are those of the whole trace, or held.
_PERCENTS = (0, 5, 25, 50, 75, 95, 99, 100)
_SINGLE_PROMPT = QuantileTable(_PERCENTS, (13, 19, 34, 169, 14214, 24428, 41155, 41155), logarithmic=True)
_SINGLE_OUTPUT = QuantileTable(_PERCENTS, (1, 17, 141, 251, 355, 665, 782, 893), logarithmic=True)
_DOCUMENT_PROMPT = QuantileTable(_PERCENTS, (826, 826, 9322, 19494, 35357, 52690, 66146, 191378), logarithmic=True)
_DOCUMENT_OUTPUT = QuantileTable(_PERCENTS, (1, 2, 6, 15, 54, 213, 532, 893), logarithmic=True)
_COMMON_SHARE = QuantileTable((0, 5, 25, 50, 75, 95, 100), (0.89, 0.89, 0.96, 0.98, 0.99, 1, 1))
_GAP_S = QuantileTable((0, 10, 25, 50, 75, 90, 95, 100), (0, 4, 14, 54, 148, 299, 423, _WINDOW_S))
_GROWTH_TOKENS = QuantileTable(_PERCENTS, (-319, -319, -10, 0, 6, 389, 855, 855))


def generate_trace(parameters: GeneratorParameters) -> Trace:
    """Windows of singles and groups, one after another, until there are enough requests."""
    model = _DocumentModel(Random(parameters.seed))
    turns: list[Turn] = []
    window_index = 0
    while len(turns) < parameters.num_requests:
        turns.extend(_in_order(model.window(window_index * _WINDOW_S), first_index=len(turns)))
        window_index += 1
    kept = turns[: parameters.num_requests]
    emitted = EmittedTurns(
        arrival_s=[turn.arrival_s for turn in kept],
        num_prompt_tokens=[turn.num_prompt_tokens for turn in kept],
        num_output_tokens=[turn.num_output_tokens for turn in kept],
        content_ids=[turn.content_ids for turn in kept],
        previous=[turn.previous for turn in kept],
    )
    return session_trace(emitted, _BLOCK_SIZE)


def _in_order(groups: list[list[Turn]], first_index: int) -> list[Turn]:
    """The groups' turns by arrival, each with the index that the turn before it in its group has got."""
    keys = sorted(
        (turn.arrival_s, group_index, turn_index)
        for group_index, turns in enumerate(groups)
        for turn_index, turn in enumerate(turns)
    )
    index_of = {key[1:]: first_index + place for place, key in enumerate(keys)}
    return [
        replace(groups[group][turn], previous=index_of[group, turn - 1] if turn else None) for _, group, turn in keys
    ]


class _DocumentModel:
    """Draws a window's groups; a single is a group of one. Holds the content ids handed out."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._blocks = BlockNumbers(first=0)

    def window(self, start_s: float) -> list[list[Turn]]:
        """All that begins and ends in the window from ``start_s`` on."""
        singles = [[self._first_turn(_SINGLE_PROMPT, _SINGLE_OUTPUT, start_s, 0.0)] for _ in range(_NUM_SINGLES)]
        return singles + [self._group(start_s, self._group_size()) for _ in range(_NUM_GROUPS)]

    def _group(self, start_s: float, size: int) -> list[Turn]:
        gaps_s = self._gaps_s(size - 1)
        turns = [self._first_turn(_DOCUMENT_PROMPT, _DOCUMENT_OUTPUT, start_s, sum(gaps_s))]
        for gap_s in gaps_s:
            turns.append(self._next_turn(turns[-1], gap_s))
        return turns

    def _gaps_s(self, count: int) -> list[float]:
        """Gaps between the turns of a group that fits into a window, as all recorded ones did."""
        while sum(gaps_s := [_GAP_S.draw(self._random) for _ in range(count)]) >= _WINDOW_S:
            pass
        return gaps_s

    def _first_turn(
        self, prompt: QuantileTable, output: QuantileTable, window_start_s: float, duration_s: float
    ) -> Turn:
        """The first request of a group that lasts ``duration_s``, anywhere in the window where that fits."""
        random = self._random
        num_prompt_tokens = round(prompt.draw(random))
        return Turn(
            arrival_s=window_start_s + random.random() * (_WINDOW_S - duration_s),
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=round(output.draw(random)),
            content_ids=self._blocks.new(-(-num_prompt_tokens // _BLOCK_SIZE)),
            previous=None,
        )

    def _next_turn(self, turn: Turn, gap_s: float) -> Turn:
        """The next question about the same document."""
        random = self._random
        num_prompt_tokens = max(_BLOCK_SIZE + 1, turn.num_prompt_tokens + round(_GROWTH_TOKENS.draw(random)))
        num_blocks = -(-num_prompt_tokens // _BLOCK_SIZE)
        num_full_blocks = min(turn.num_prompt_tokens, num_prompt_tokens) // _BLOCK_SIZE
        num_shared = max(1, min(round(_COMMON_SHARE.draw(random) * num_blocks), num_full_blocks))
        return Turn(
            arrival_s=turn.arrival_s + gap_s,
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=round(_DOCUMENT_OUTPUT.draw(random)),
            content_ids=turn.content_ids[:num_shared] + self._blocks.new(num_blocks - num_shared),
            previous=None,
        )

    def _group_size(self) -> int:
        random = self._random
        sizes, counts = zip(*_GROUPS_BY_SIZE, strict=True)
        size = int(random.choices(sizes, counts)[0])
        if size < _GROUPS_BY_SIZE[-1][0]:
            return size
        return min(_LARGE_GROUP_MAX, round(size + random.expovariate(1 / (_LARGE_GROUP_MEAN - size))))
