"""Finds what would stop train.py, as far as it can be seen without a model; run.sh asks before it builds one.

python -m meme_llava.precheck <the flags of train.py>
"""

from meme_llava.arguments import parse_train_arguments
from meme_llava.dataset import Problem, check_image_folder, find_images, read_records, report_problems
from meme_llava.errors import stop_on_user_error


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Check settings, annotations and the headers of all pictures."""
    arguments = parse_train_arguments(argv, description=__doc__)
    check_image_folder(arguments.image_folder)
    records, problems = read_records(arguments.annotations)
    usable = 0
    for record in records:
        try:
            find_images(record, arguments.image_folder)
            usable += 1
        except ValueError as error:
            problems.append(Problem(record.place, record.record_id, str(error)))
    report_problems(arguments.annotations, usable, problems, arguments.bad_records)
    print(f"settings are sound, {usable} records can be trained on as far as seen without a model")


if __name__ == "__main__":
    main()
