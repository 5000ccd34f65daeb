"""Prefill and decode on separate devices, from the prompt to the last token.

Run it with ``python docs/examples/pd_scheduler.py``; what it prints is in ``pd_scheduler.out`` beside it.
"""

from sagellm.runtime.scheduler import PDScheduler, PDSchedulerConfig
from sagellm.runtime.scheduler.base import Batch, Request


def run_model(batch: Batch) -> list[int]:
    """Stands for a device: "computes" the batch, and gives one token for each request that gets one."""
    return [100 + entry.num_computed_tokens + entry.num_tokens for entry in batch.entries if entry.samples]


def show(batch: Batch) -> None:
    shares = ", ".join(f"{entry.request_id}: {entry.num_tokens}" for entry in batch.entries)
    print(f"{batch.phase} on device {batch.device_id}, tokens of {shares}")


def main() -> None:
    config = PDSchedulerConfig(prefill_device_ids=[0, 1], decode_device_ids=[2, 3, 4, 5])
    scheduler = PDScheduler(config)
    scheduler.add_request(Request(request_id="req_1", prompt_token_ids=[1, 2, 3], max_new_tokens=4))
    scheduler.add_request(Request(request_id="req_2", prompt_token_ids=list(range(700)), max_new_tokens=3))

    while scheduler.has_unfinished_requests:
        while (batch := scheduler.get_prefill_batch()) is not None:
            show(batch)
            scheduler.complete_prefill(batch, run_model(batch))
        for task in scheduler.get_migrations():
            print(
                f"copy {task.num_bytes} bytes of {task.request_id}: {task.source_device_id} -> {task.target_device_id}"
            )
            scheduler.complete_migration(task)
        batch = scheduler.get_decode_batch()
        if batch is not None:
            show(batch)
            scheduler.complete_decode(batch, run_model(batch))

    for request_id in ("req_1", "req_2"):
        request = scheduler.get_request(request_id)
        print(f"{request_id} {request.status} ({request.finish_reason}): {list(request.output_token_ids)}")
    print(f"{scheduler.statistics().num_migrated_bytes} bytes moved")


if __name__ == "__main__":
    main()
