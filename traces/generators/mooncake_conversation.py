"""``mooncake-conv``: fitted to the Mooncake FAST'25 conversation trace (Apache-2.0).

Sessions begin as two Poisson processes: fresh ones, which share the first block (one system prompt for
all), and branches, which share some leading blocks with an earlier request. A follow-up's prompt is the
prompt and reply before it and what the user adds. The trace's own rise from 3.0 to 3.7 requests/s comes
of itself, from follow-ups to sessions that began inside the recorded hour. Of eight traces of 12,031
requests: block hits without eviction .354-.379 (recorded .366), LRU of 1k/10k blocks .043-.046/.198-.218
(.045/.211), mean prompt 12.1-12.6k (12,035), mean output 336-342 (343), 3.49-3.60 requests/s (3.40).
"""

from bisect import bisect_left, bisect_right
from random import Random

from traces.generators.contract import GeneratorParameters
from traces.generators.quantile_table import QuantileTable
from traces.generators.session_trace import BlockNumbers, EmittedTurns, Turn, emit_turns, session_trace
from traces.request_trace import Trace

_BLOCK_SIZE = 512
_FRESH_RATE_RPS = 2.085
_BRANCH_RATE_RPS = 0.193
_PROMPT_TOKENS_MAX = 126_195  # the longest recorded: a session that would go beyond it ends
_GAP_MU, _GAP_SIGMA = 4.885, 0.984  # of a lognormal in seconds, from arrival to arrival

_PERCENTS = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100)
_FRESH_PROMPT = QuantileTable(
    _PERCENTS, (891, 894, 897, 905, 1336, 5264, 13056, 25559, 38494, 89868, 126195), logarithmic=True
)
_BRANCH_PROMPT = QuantileTable(
    _PERCENTS, (892, 892, 2733, 5902, 9982, 14693, 20280, 28992, 33495, 67868, 96504), logarithmic=True
)
_BRANCH_SHARE = QuantileTable(_PERCENTS, (0.015, 0.033, 0.054, 0.074, 0.125, 0.238, 0.486, 0.823, 0.953, 1, 1))
_BRANCH_AGE_S = QuantileTable(_PERCENTS, (0, 18, 36, 48, 75, 120, 252, 528, 680, 1789, 2409))
_ROOT_OUTPUT = QuantileTable(_PERCENTS, (1, 3, 9, 22, 155, 351, 467, 585, 674, 1010, 2000), logarithmic=True)
_FOLLOW_UP_OUTPUT = QuantileTable(_PERCENTS, (1, 3, 13, 28, 155, 356, 492, 633, 775, 1525, 2000), logarithmic=True)
_NEW_USER_TOKENS = QuantileTable(_PERCENTS, (-1291, -316, -18, -2, 9, 26, 384, 4363, 7238, 16805, 91467))

_SIZE_EDGES_TOKENS = (1_000, 2_000, 4_000, 8_000, 16_000, 32_000)
_FOLLOW_UP_PROBABILITY = (  # a row per turn, the last for all later ones; a column per prompt size
    (0, 0.46, 0.42, 0.35, 0.27, 0.26, 0.24),
    (0, 0.50, 0.49, 0.47, 0.32, 0.42, 0.39),
    (0, 0.63, 0.55, 0.65, 0.55, 0.53, 0.45),
    (0, 0.73, 0.74, 0.66, 0.69, 0.73, 0.64),
)


def generate_trace(parameters: GeneratorParameters) -> Trace:
    """Sessions with the trace's own rate of starts."""
    model = _ConversationModel(Random(parameters.seed))
    return session_trace(emit_turns(parameters.num_requests, model.first_turn, model.next_turn), _BLOCK_SIZE)


class _ConversationModel:
    """Draws turns; holds the clock of session starts and the content ids handed out."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._start_s = 0.0
        self._blocks = BlockNumbers(first=1)

    def first_turn(self, emitted: EmittedTurns) -> Turn:
        """The next session's first turn; a branch looks back at the requests so far."""
        random = self._random
        self._start_s += random.expovariate(_FRESH_RATE_RPS + _BRANCH_RATE_RPS)
        shared: tuple[int, ...] = (0,)
        is_branch = random.random() * (_FRESH_RATE_RPS + _BRANCH_RATE_RPS) < _BRANCH_RATE_RPS
        num_prompt_tokens = round((_BRANCH_PROMPT if is_branch else _FRESH_PROMPT).draw(random))
        if is_branch and emitted.arrival_s:
            shared = self._branch_prefix(emitted, num_prompt_tokens)
        return Turn(
            arrival_s=self._start_s,
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=round(_ROOT_OUTPUT.draw(random)),
            content_ids=self._extended(shared, num_prompt_tokens),
            previous=None,
        )

    def next_turn(self, turn: Turn, index: int) -> Turn | None:
        """The follow-up, where the user has one and its prompt is not too long."""
        random = self._random
        row = _FOLLOW_UP_PROBABILITY[min(turn.turn_index, len(_FOLLOW_UP_PROBABILITY) - 1)]
        if random.random() >= row[bisect_right(_SIZE_EDGES_TOKENS, turn.num_prompt_tokens)]:
            return None
        context_tokens = turn.num_prompt_tokens + turn.num_output_tokens
        num_prompt_tokens = max(_BLOCK_SIZE + 1, context_tokens + round(_NEW_USER_TOKENS.draw(random)))
        if num_prompt_tokens > _PROMPT_TOKENS_MAX:
            return None
        return Turn(
            arrival_s=turn.arrival_s + random.lognormvariate(_GAP_MU, _GAP_SIGMA),
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=round(_FOLLOW_UP_OUTPUT.draw(random)),
            content_ids=self._extended(turn.content_ids[: turn.num_prompt_tokens // _BLOCK_SIZE], num_prompt_tokens),
            previous=index,
            turn_index=turn.turn_index + 1,
        )

    def _branch_prefix(self, emitted: EmittedTurns, num_prompt_tokens: int) -> tuple[int, ...]:
        """Leading blocks in common with the request that arrived about a drawn time before."""
        age_s = _BRANCH_AGE_S.draw(self._random)
        other = min(bisect_left(emitted.arrival_s, self._start_s - age_s), len(emitted.arrival_s) - 1)
        # Fewer than two blocks in common, the first being everybody's, would make it a fresh session.
        num_shared = max(2, int(_BRANCH_SHARE.draw(self._random) * -(-num_prompt_tokens // _BLOCK_SIZE)))
        num_full_blocks = emitted.num_prompt_tokens[other] // _BLOCK_SIZE
        return emitted.content_ids[other][: min(num_shared, num_full_blocks)]

    def _extended(self, shared: tuple[int, ...], num_prompt_tokens: int) -> tuple[int, ...]:
        """As many ids as the prompt has blocks: the shared ones as far as it fills them, then new ones."""
        kept = shared[: num_prompt_tokens // _BLOCK_SIZE]
        return kept + self._blocks.new(-(-num_prompt_tokens // _BLOCK_SIZE) - len(kept))
