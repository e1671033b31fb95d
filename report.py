"""Put experiments side by side: one HTML page to look at, and its tables as CSV.

    python report.py output output_b
    python report.py base=output/scores_before output RapidOCR=output/scores_rapidocr --output report.html

Every run is an OUTPUT_DIR of run.sh or an output_dir of evaluate.py, all asked the same questions; NAME= in front of it
heads its column. The page holds recipes, scores with intervals, curves, and every image with all answers.
"""

from meme_llava.errors import UserError, stop_on_user_error
from meme_llava.evaluate.settings import parse_report_arguments
from meme_llava.report.experiment import read_experiments
from meme_llava.report.report_page import render_report, render_table
from meme_llava.storage.files import write_whole

# Spreadsheets take a file without it for one in the local encoding.
BYTE_ORDER_MARK = "\ufeff"


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_report_arguments(argv, description=__doc__)
    experiments = read_experiments(arguments.runs)
    table = arguments.output.with_suffix(".csv")
    try:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(arguments.output, render_report(arguments.title, experiments, arguments.max_answers))
        write_whole(table, BYTE_ORDER_MARK + render_table(experiments))
    except OSError as error:
        raise UserError(f"--output {arguments.output}: cannot be written ({error})") from error
    for experiment in experiments:
        if experiment.warning:
            print(experiment.warning)
        if "train type" in experiment.facts and not experiment.log_history:
            print(f"{experiment.name}: its trainer_state.json is not where it was, so the page has no curves of it")
    print(f"page:  {arguments.output}\ntable: {table}")


if __name__ == "__main__":
    main()
