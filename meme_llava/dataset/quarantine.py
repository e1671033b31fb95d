"""The file that lists the records left out of training, with the reasons and the records themselves."""

from pathlib import Path

from meme_llava.dataset.checked_data import CheckedData
from meme_llava.dataset.findings import RecordFault
from meme_llava.dataset.records import iterate_values
from meme_llava.errors import UserError
from meme_llava.storage.files import write_lines

QUARANTINE = "quarantine.jsonl"


def write_quarantine(output_dir: Path, checked: CheckedData) -> Path | None:
    """List bad records in quarantine.jsonl: place, id, reasons and the record itself, so that nothing is lost.

    Returns its path, or None if there is no bad record.
    """
    reasons = checked.bad
    path = output_dir / QUARANTINE
    path.unlink(missing_ok=True)
    if not reasons:
        return None
    output_dir.mkdir(parents=True, exist_ok=True)
    lines = (
        {
            "place": place,
            "record_id": reasons[place][0].record_id,
            "reasons": [{"kind": finding.kind, "detail": finding.detail} for finding in reasons[place]],
            "record": value.content if isinstance(value, RecordFault) else value,
        }
        for place, value in iterate_values(checked.annotations)
        if place in reasons
    )
    write_lines(path, lines)
    return path


def read_quarantined_places(path: Path) -> set[str]:
    """The places of the records in a file that `write_quarantine` wrote."""
    places = set()
    for where, line in iterate_values(path):
        if not isinstance(line, dict) or not isinstance(line.get("place"), str):
            raise UserError(
                f"{path}: {where.removeprefix(path.name).strip()} names no place; expected quarantine.jsonl"
            )
        places.add(line["place"])
    return places
