"""A summarised run in the form that the HTML page and the Perfetto export take."""

from collections.abc import Iterator

from sim.report.report_run import ReportInstance, ReportRun
from sim.report.summarised_run import SummarisedRun
from sim.report.table import table_rows


def report_run(run: SummarisedRun, notes: tuple[str, ...] = ()) -> ReportRun:
    """``notes`` are sentences for the reader, such as what a trace reader changed."""
    return ReportRun(
        cluster=run.cluster,
        trace=run.trace,
        seed=run.seed,
        profile_status=run.profile_status,
        metrics=run.metrics,
        summary_rows=tuple(_named_rows(run)),
        instances=tuple(
            ReportInstance(instance_id, role=run.roles[instance_id], num_blocks=num_blocks)
            for instance_id, num_blocks in run.num_blocks.items()
        ),
        notes=notes,
    )


def _named_rows(run: SummarisedRun) -> Iterator[tuple[str, str]]:
    """The terminal table's rows, each named in full where the table leaves out what the line above has."""
    metric = ""
    for row in table_rows([run]):
        metric = row.metric or metric
        yield (f"{metric}, {row.detail}" if row.detail else metric), row.cells[0]
