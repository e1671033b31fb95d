"""The data check: everything that is wrong or unusual about an annotation file and its images, record by record.

data/check.py, run.sh before it builds, and train.py before it loads a model all ask here. Nothing is dropped or
replaced silently: every bad record is listed with its place, kind and reason. Nothing about models.
"""

from collections.abc import Sequence
from pathlib import Path

from meme_llava.dataset.checked_data import CheckedData, CheckedRecord, stop_on_bad_records
from meme_llava.dataset.conversation import CONTROL_TOKENS, IMAGE_PLACEHOLDER
from meme_llava.dataset.findings import Finding, RecordFault
from meme_llava.dataset.image_inspection import ImageFacts, Inspection, check_image
from meme_llava.dataset.images import resolve_image_path
from meme_llava.dataset.records import Record, read_records
from meme_llava.dataset.settings import RecordPolicy, RecordSource
from meme_llava.dataset.text_quality import find_loop, find_refusal, measure_recall, normalise_text
from meme_llava.dataset.tokenization import Conversation, Tokenization, TokenizedRecords, tokenize_records
from meme_llava.errors import UserError
from meme_llava.terminal import show_count

SMALLEST_RECALL = 0.5  # of the characters known to stand in an image; a caption may quote them in part
# Short answers ("有", "图片里没有文字。") may well answer two questions about one image.
SHORT_ANSWER = 10  # characters that are letters or digits


def check_data(
    source: RecordSource,
    policy: RecordPolicy,
    tokens: Tokenization | None = None,
    inspection: Inspection | None = None,
) -> CheckedData:
    """Read and check every record, tokenise it, and look at every image.

    Args:
        tokens: how records are encoded; without it, nothing is known about lengths.
        inspection: how images are looked at; every one is opened whole if it is not given.

    Raises:
        UserError: the annotation file or the image folder cannot be read at all.
    """
    check_image_folder(source.image_folder)
    inspection = inspection or Inspection()
    records, malformed = read_records(source.annotations)
    checked_records = [_resolve_images(record, source.image_folder) for record in records]
    facts = inspection.inspect((path for one in checked_records for path in one.image_paths), policy.max_pixels)
    judged = {path: check_image(path, found, policy.max_pixels) for path, found in facts.items()}
    originals = _find_first_copies(facts)
    tokenized = None if tokens is None else _tokenize(checked_records, tokens, inspection.workers)
    for checked in checked_records:
        for path in checked.image_paths:
            for kind, detail in judged[path]:
                _add(checked, kind, detail)
            if originals.get(path, path) != path:
                _add(checked, "duplicate_image", f"{path}: has the bytes of {originals[path]}")
        _check_text(checked, CONTROL_TOKENS if tokens is None else tokens.encoder.control_tokens)
        _check_length(checked)
    checked_data = CheckedData(source.annotations, policy.severities, checked_records, malformed, facts, tokenized)
    _find_duplicates(checked_data)
    return checked_data


def check_records(source: RecordSource, policy: RecordPolicy) -> CheckedData:
    """Check records without a model, and decode every image.

    Raises:
        UserError: a record or image is bad, or nothing is left.
    """
    checked = check_data(source, policy, inspection=Inspection(show_progress=show_count))
    stop_on_bad_records(checked, policy.bad_records)
    return checked


def check_image_folder(image_folder: Path) -> None:
    """Raise UserError unless the folder exists."""
    if not image_folder.is_dir():
        raise UserError(f"{image_folder}: no such image folder")


def _add(checked: CheckedRecord, kind: str, detail: str) -> None:
    record = checked.record
    checked.findings.append(Finding(kind, record.place, record.record_id, detail))


def _resolve_images(record: Record, image_folder: Path) -> CheckedRecord:
    try:
        return CheckedRecord(record, tuple(resolve_image_path(image, image_folder) for image in record.images))
    except RecordFault as fault:
        return CheckedRecord(record, (), [Finding(fault.kind, record.place, record.record_id, str(fault))])


def _find_first_copies(facts: dict[Path, ImageFacts]) -> dict[Path, Path]:
    """Every file whose contents are known: the first file with the same bytes."""
    first: dict[str, Path] = {}
    return {path: first.setdefault(fact.sha256, path) for path, fact in facts.items() if fact.sha256 is not None}


def _check_text(checked: CheckedRecord, control_tokens: Sequence[str]) -> None:
    for index, turn in enumerate(checked.record.turns):
        where = f"turn {index + 1}"
        spelt = [
            token
            for token in control_tokens
            if token in turn.text and not (token == IMAGE_PLACEHOLDER and turn.role == "user")
        ]
        if spelt:
            _add(checked, "control_text", f"{where} spells {', '.join(spelt)}")
        if turn.role == "assistant":
            if refusal := find_refusal(turn.text):
                _add(checked, "refusal", f"{where} refuses: {refusal!r}")
            if (loop := find_loop(turn.text)) is not None:
                _add(checked, "loop", f"{where} repeats {loop[:30]!r}")
    text = checked.record.text
    if text:
        answers = "".join(turn.text for turn in checked.record.turns if turn.role == "assistant")
        recall = measure_recall(text, answers)
        if recall < SMALLEST_RECALL:
            _add(checked, "text_disagrees", f"{recall:.0%} of the characters of {text!r} are in the answer")


def _tokenize(checked_records: Sequence[CheckedRecord], tokens: Tokenization, workers: int | None) -> TokenizedRecords:
    conversations = [Conversation(checked.record.turns, checked.image_paths) for checked in checked_records]
    tokenized = tokenize_records(conversations, tokens, workers)
    for checked, lengths in zip(checked_records, tokenized.lengths, strict=True):
        checked.lengths = lengths
    return tokenized


def _check_length(checked: CheckedRecord) -> None:
    lengths = checked.lengths
    if lengths is None:
        return
    if lengths.misfit is not None:
        _add(checked, "too_long", lengths.misfit)
    elif lengths.cut_tokens:
        _add(checked, "cut_answer", f"{lengths.cut_tokens} positions cut")


def _find_duplicates(data: CheckedData) -> None:
    """Of records that share an id or a caption the first usable one stays; one that is left out does not count."""
    ids: dict[str, str] = {}
    captions: dict[tuple, str] = {}
    for checked in data.records:
        record = checked.record
        if record.record_id in ids:
            _add(checked, "duplicate_id", f"has the id of {ids[record.record_id]}")
        if not data.is_usable(checked):
            continue
        ids.setdefault(record.record_id, record.place)
        if record.repeat == 1:
            first = captions.setdefault(_make_caption_key(checked), record.place)
            if first != record.place:
                _add(checked, "duplicate_caption", f"says the same as {first}")


def _make_caption_key(checked: CheckedRecord) -> tuple:
    """What two records share if they teach the same: images and answers, and questions where an answer is short."""
    turns = checked.record.turns
    answers = tuple(normalise_text(turn.text) or turn.text for turn in turns if turn.role == "assistant")
    questions = tuple(turn.text for turn in turns if turn.role != "assistant")
    is_long = bool(checked.image_paths) and all(len(answer) >= SHORT_ANSWER for answer in answers)
    return checked.image_paths, answers, () if is_long else questions
