"""A summarised run in the form that the HTML page and the Perfetto export take."""

from sim.report.report_run import ReportInstance, ReportRun
from sim.report.summarised_run import SummarisedRun
from sim.report.table import table_rows


def report_run(run: SummarisedRun, notes: tuple[str, ...] = ()) -> ReportRun:
    """``notes`` are sentences for the reader, such as what a trace reader changed."""
    label = ""
    rows: list[tuple[str, str]] = []
    for row in table_rows([run]):
        label = row.metric or label
        rows.append((f"{label} {row.detail}".strip(), row.cells[0]))
    return ReportRun(
        cluster=run.cluster,
        trace=run.trace,
        seed=run.seed,
        profile_status=run.profile_status,
        metrics=run.metrics,
        summary_rows=tuple(rows),
        instances=tuple(
            ReportInstance(instance_id, role=run.roles[instance_id], num_blocks=num_blocks)
            for instance_id, num_blocks in run.num_blocks.items()
        ),
        notes=notes,
    )
