"""Whether fast steps still compute the right thing: logits beside transformers', and texts beside the eager path's.

    python -m benchmarks.h200.check_outputs OUT.json

*Logits*: transformers in bf16 and we, both against transformers in float32, on the same random weights. *Texts*: what
an instance generates greedily, its decodes replayed from device graphs and its prompts in chunks beside them, against
the same model launched operator by operator, with the backend's kernels and with torch's operators. Exit code 1 where
our logits are more than 1.5 times as far off as those of transformers, or a text parts from the eager one where the two
tokens were further apart than bf16 can tell, which is measured (``text_check``).

    python -m benchmarks.h200.check_outputs OUT.json --backend cpu --logits sagellm/toy:1 --texts sagellm/toy

tries it on a CPU.
"""

import argparse
import gc
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from backends.base import HardwareBackend
from backends.registry import get_backend
from benchmarks.h200.attempt import attempted
from benchmarks.h200.logits_check import LogitsCheck, LogitsError, check_logits
from benchmarks.h200.text_check import TextCheck, check_texts

LOGITS_OF = ("Qwen/Qwen2.5-7B:4", "Qwen/Qwen3-0.6B:0", "Qwen/Qwen2.5-7B:0")
TEXTS_OF = ("Qwen/Qwen3-0.6B", "Qwen/Qwen2.5-7B")


@dataclass(slots=True)
class Document:
    """What the JSON file holds."""

    device: str
    torch: str
    logits: list[LogitsCheck] = field(default_factory=list)
    texts: list[TextCheck] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def is_kept(self) -> bool:
        logits_kept = all(check.is_kept for check in self.logits)
        return not self.failures and logits_kept and all(check.is_kept for check in self.texts)


def main(words: list[str] | None = None) -> int:
    arguments = parse_arguments(words)
    backend = get_backend(arguments.backend)
    document = Document(backend.get_device_info(0).name, torch.__version__)
    started_s = time.monotonic()
    for name in arguments.logits:
        check_one_logits(name, arguments.prompts, backend, document)
        write(arguments.out, document)
    for model in arguments.texts:
        check_some_texts(model, arguments, backend, document)
        write(arguments.out, document)
    write(arguments.out, document)
    print_summary(document, time.monotonic() - started_s)
    return 0 if document.is_kept else 1


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file for what is found")
    parser.add_argument("--backend", default="cuda", help="name of a hardware backend")
    parser.add_argument("--logits", nargs="*", default=LOGITS_OF, metavar="MODEL:LAYERS", help="0 layers: all")
    parser.add_argument("--prompts", type=int, nargs="+", default=(17, 129, 500, 1000), help="lengths, for logits")
    parser.add_argument("--texts", nargs="*", default=TEXTS_OF, metavar="MODEL")
    parser.add_argument("--num-texts", type=int, default=64)
    parser.add_argument("--num-tokens", type=int, default=64, help="of each text")
    return parser.parse_args(words)


def check_one_logits(name: str, prompt_lens: list[int], backend: HardwareBackend, document: Document) -> None:
    model, _, layers = name.rpartition(":")

    def call() -> LogitsCheck:
        return check_logits(model, int(layers), list(prompt_lens), backend)

    found = attempted(f"logits of {name}", call, document.failures)
    if found is not None:
        document.logits.append(found)
        print(line_of_logits(found), flush=True)
    release(backend)


def check_some_texts(model: str, arguments: argparse.Namespace, backend: HardwareBackend, document: Document) -> None:
    def call() -> list[TextCheck]:
        return check_texts(model, arguments.num_texts, arguments.num_tokens, backend)

    for found in attempted(f"texts of {model}", call, document.failures) or ():
        document.texts.append(found)
        print(line_of_texts(found), flush=True)
    release(backend)


def release(backend: HardwareBackend) -> None:
    gc.collect()
    backend.release_cached_memory()


def line_of_logits(check: LogitsCheck) -> str:
    def shown(error: LogitsError) -> str:
        return f"{error.relative:.3g} ({error.share_same_argmax:.1%})"

    return (
        f"{check.model}, {check.num_layers} layers, {check.dtype}, {check.num_rows} rows; off the wider type by "
        f"(same most likely token): transformers {shown(check.transformers)}, ours prefilled {shown(check.prefilled)}, "
        f"decoded {shown(check.decoded)}; {check.ratio:.2f} times as far: {'kept' if check.is_kept else 'NOT KEPT'}"
    )


def line_of_texts(check: TextCheck) -> str:
    parted = ", ".join(f"{number} at {gap}" for gap, number in check.gaps().items())
    return (
        f"{check.model} beside {check.eager}: of {check.num_texts} texts of {check.num_tokens} tokens "
        f"{check.num_equal} are equal, {check.num_close} part where the type cannot tell, "
        f"{len(check.partings) - check.num_close} elsewhere{f'; gaps in spacings: {parted}' if parted else ''} "
        f"({check.num_different_tokens:,} different tokens; noise of a logit {check.noise:.2g})"
    )


def write(path: Path, document: Document) -> None:
    """After every check, so that an interrupted run leaves what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(document) | {"kept": document.is_kept}, indent=1) + "\n", encoding="utf-8")


def print_summary(document: Document, duration_s: float) -> None:
    print(f"\non {document.device}, torch {document.torch}, {duration_s:.0f} s")
    for logits in document.logits:
        print(line_of_logits(logits))
    for texts in document.texts:
        print(line_of_texts(texts))
    for failure in document.failures:
        print(f"failed: {failure}")
    print("kept" if document.is_kept else "NOT KEPT")


if __name__ == "__main__":
    sys.exit(main())
