"""Check an annotation file and all its images before anything is trained on them.

python data/check.py --annotations data/annotations.json --image_folder data
python data/check.py --annotations train.json --image_folder /data/memes --model output_7b/base --bad_records quarantine

Every image is decoded, every record is looked at; output/check/report.html shows what was found.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from meme_llava.cli import parse_arguments, to_plain  # noqa: E402
from meme_llava.dataset.check import check_data, suggest_folder, write_quarantine  # noqa: E402
from meme_llava.dataset.findings import QUARANTINE  # noqa: E402
from meme_llava.errors import UserError, count, stop_on_user_error  # noqa: E402
from meme_llava.report.data_check import (  # noqa: E402
    FINDINGS,
    REPORT,
    CheckArguments,
    list_facts,
    make_histograms,
    print_summary,
    render_check_page,
)
from meme_llava.storage.files import hash_file, write_lines, write_whole  # noqa: E402
from meme_llava.storage.folders import check_output_dir, write_directory  # noqa: E402
from meme_llava.storage.run_record import RUN_RECORD, read_run_record, write_run_record  # noqa: E402


def check_replaces_report(output_dir: Path) -> None:
    """A report is made again in the time of a check, so the next one replaces it unasked. Raises UserError where what
    it would replace is another result, which may have taken days."""
    if (output_dir / RUN_RECORD).is_file() and (stage := read_run_record(output_dir).get("stage")) != "check":
        raise UserError(
            f"{output_dir}: holds what {stage!r} wrote ({RUN_RECORD}), and only an earlier report is replaced; choose "
            "another --output_dir"
        )


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(CheckArguments, argv, description=__doc__)
    check_output_dir(arguments.output_dir, overwrite=True)
    check_replaces_report(arguments.output_dir)
    processing = None
    if arguments.model is not None:
        # Loads torch and transformers, which take longer than the check of a few thousand records.
        from meme_llava.model.llava import load_processing

        processing = load_processing(arguments.model)
    checked = check_data(
        arguments.annotations,
        arguments.image_folder,
        arguments,
        processing.encoder if processing else None,
        arguments.model_max_length,
        workers=arguments.workers,
    )
    facts = list_facts(checked, processing.tokens_per_image if processing else None, arguments)
    histograms = make_histograms(checked)
    print_summary(checked, facts, histograms)
    with write_directory(arguments.output_dir, overwrite=True) as folder:
        write_whole(folder / REPORT, render_check_page(checked, facts, histograms, arguments))
        severity_of = arguments.severity_of
        write_lines(folder / FINDINGS, ({**vars(one), "severity": severity_of(one.kind)} for one in checked.findings))
        write_quarantine(folder, checked)
        found = {"facts": dict(facts), "findings": checked.counts}
        settings, sha256 = to_plain(arguments), hash_file(arguments.annotations)
        write_run_record(folder, "check", settings=settings, annotations_sha256=sha256, **found)
    print(f"report: {arguments.output_dir / REPORT}; all findings: {arguments.output_dir / FINDINGS}")
    if not checked.usable:
        first = f", e.g. {checked.findings[0]}" if checked.findings else ""
        raise UserError(
            f"{arguments.annotations}: holds no record that can be trained on{first}{suggest_folder(checked)}"
        )
    if not checked.bad:
        print(f"{count(len(checked.usable), 'record')} can be trained on, none is bad")
        return
    verb = "is" if len(checked.bad) == 1 else "are"
    listed = f"{len(checked.bad):,} of {count(checked.total, 'record')} {verb} bad"
    listed += f"; {arguments.output_dir / QUARANTINE} holds them with the reasons"
    if arguments.bad_records == "error":
        raise UserError(f"{listed}. Fix them, or train without them: --bad_records quarantine{suggest_folder(checked)}")
    print(f"{listed}. train.py --bad_records quarantine leaves them out")


if __name__ == "__main__":
    main()
