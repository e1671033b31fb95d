"""What would stop train.py, found without a model; run.sh asks before it builds one.

python -m meme_llava.train.precheck <the flags of train.py>
"""

from meme_llava.dataset.check import check_records, print_findings
from meme_llava.errors import stop_on_user_error
from meme_llava.train.session import check_device
from meme_llava.train.settings import parse_train_arguments
from meme_llava.train.trackers import check_trackers


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Check settings, annotations and all images."""
    arguments = parse_train_arguments(argv, description=__doc__, prog="train.py")
    check_device(arguments)
    check_trackers(arguments.report_to)
    checked = check_records(arguments.annotations, arguments.image_folder, arguments)
    if arguments.eval_every is not None:
        from meme_llava.train.evaluation import check_validation  # loads transformers

        check_validation(arguments)
    print_findings(checked)
    print(f"settings are sound, {len(checked.usable)} records can be trained on as far as seen without a model")


if __name__ == "__main__":
    main()
