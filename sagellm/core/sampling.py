"""How the next token is drawn from a model's logits. The machines carry it, and never look inside."""

import msgspec


class SamplingParameters(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One request's wishes, in the meaning that OpenAI's API and vLLM give them.

    A request is drawn with its own ``seed`` and the position of the token, and nothing else: neither
    other requests of the batch nor a preemption change what comes out.
    """

    temperature: float = 1.0  # 0: the most likely token (greedy)
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    min_tokens: int = 0  # before that many output tokens no stop token is drawn
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    allowed_token_ids: tuple[int, ...] = ()  # empty: all
    bad_words: tuple[tuple[int, ...], ...] = ()  # runs of token ids that must not come out
    num_logprobs: int | None = None  # so many of the most likely tokens are reported beside the drawn one


GREEDY = SamplingParameters(temperature=0.0)
