"""Config keys of earlier versions, each with what to write instead; a launch refuses them by this table."""

RENAMED_KEYS: dict[str, str] = {
    "neighbour_tuning": "suncet",
    "data.stage_to": "data.copy_to",
}
