"""Summarised runs become page runs with the terminal table's figures, each row named in full."""

from synthetic_report_runs import SLO, synthetic_run

from sagellm.core.config import Role
from sim.report.picture_input import report_run
from sim.report.summarised_run import SummarisedRun
from sim.report.summary import summarise


def test_rows_are_those_of_the_table_with_full_names() -> None:
    run = synthetic_run(120, 1, 1)
    num_blocks = {instance.instance_id: instance.num_blocks for instance in run.instances}
    summary = summarise(run.metrics, num_blocks)
    page_run = report_run(
        SummarisedRun(
            cluster=run.cluster,
            trace=run.trace,
            seed=run.seed,
            slo=SLO,
            profile_status=run.profile_status,
            log_sha256="",
            wall_s=1.0,
            num_blocks=num_blocks,
            roles={instance.instance_id: Role(instance.role) for instance in run.instances},
            metrics=run.metrics,
            summary=summary,
        ),
        notes=("A note.",),
    )
    rows = dict(page_run.summary_rows)
    assert len(rows) == len(page_run.summary_rows)
    assert rows["requests, completed"] == str(summary.completed)
    assert rows["requests, rejected"] == str(summary.rejected)
    assert summary.ttft is not None
    assert rows["TTFT (ms), p90"].replace(",", "").startswith(f"{summary.ttft.p90_ms:.1f}")
    assert [(i.role, i.num_blocks) for i in page_run.instances] == [("prefill", 10_000), ("decode", 10_000)]
    assert page_run.notes == ("A note.",)
