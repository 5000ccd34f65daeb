"""What an instance counts of its own work, from the effects that pass by."""

from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.messages import EmitTokens, RunStep
from sagellm.server.engine import InstanceStatus


class InstanceCounts:
    """Sums for `InstanceStatus`."""

    def __init__(self, instance_id: InstanceId) -> None:
        self._instance_id = instance_id
        self._last_step: RunStep | None = None
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0
        self._num_preemptions = 0
        self._num_prefix_query_tokens = 0
        self._num_prefix_hit_tokens = 0
        self.core_ns = 0

    def ran(self, step: RunStep) -> None:
        plan = step.plan
        self._last_step = step
        self._num_steps += 1
        self._num_preemptions += len(plan.preempted_request_ids)
        for chunk in plan.chunks:
            self._num_prompt_tokens += chunk.num_tokens

    def looked_up(self, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """A request's prompt was looked for in the prefix cache."""
        self._num_prefix_query_tokens += num_prompt_tokens
        self._num_prefix_hit_tokens += num_cached_tokens

    def emitted(self, emit: EmitTokens) -> None:
        self._num_output_tokens += len(emit.request_ids) * len(emit.ends_ns)

    def status(self, is_empty: bool) -> InstanceStatus:
        """As of the last step; with nothing there, nothing runs, waits or holds blocks."""
        step = None if is_empty else self._last_step
        return InstanceStatus(
            instance_id=self._instance_id,
            num_running=0 if step is None else step.num_running,
            num_waiting=0 if step is None else step.num_waiting,
            num_blocks_in_use=0 if step is None else step.num_blocks_in_use,
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            num_preemptions=self._num_preemptions,
            num_prefix_query_tokens=self._num_prefix_query_tokens,
            num_prefix_hit_tokens=self._num_prefix_hit_tokens,
            core_ns=self.core_ns,
        )


class PromptLookups:
    """Which requests' first tokens were planned here, and so how much of their prompt was cached."""

    def __init__(self, counts: InstanceCounts) -> None:
        self._counts = counts
        self._yet_to_plan: dict[RequestId, int] = {}  # prompt tokens

    def assigned(self, request_id: RequestId, num_prompt_tokens: int) -> None:
        self._yet_to_plan[request_id] = num_prompt_tokens

    def forget(self, request_id: RequestId) -> None:
        self._yet_to_plan.pop(request_id, None)

    def planned(self, step: RunStep) -> dict[RequestId, int]:
        """Cached prompt tokens of requests that are planned for the first time, where there are any."""
        hits: dict[RequestId, int] = {}
        if not self._yet_to_plan:
            return hits
        for chunk in step.plan.chunks:
            num_prompt_tokens = self._yet_to_plan.pop(chunk.request_id, None)
            if num_prompt_tokens is None:
                continue
            num_cached = min(chunk.num_computed_tokens, num_prompt_tokens)
            self._counts.looked_up(num_prompt_tokens, num_cached)
            if num_cached:
                hits[chunk.request_id] = num_cached
        return hits
