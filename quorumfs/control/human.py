"""Numbers and times for a reader, or a program."""

from datetime import UTC, datetime


def human_bytes(count: int) -> str:
    """A number of bytes for a reader."""
    if count < 1024:
        return f"{count} B"
    value, units = count / 1024, iter(("KiB", "MiB", "GiB", "TiB", "PiB"))
    unit = next(units)
    while value >= 1023.95 and unit != "PiB":  # what would be shown as 1024.0
        value, unit = value / 1024, next(units)
    return f"{value:.1f} {unit}"


def human_time(seconds: int) -> str:
    """A time for a reader."""
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def time_stamp(at: float, precision: str = "milliseconds") -> str:
    """*at*, in seconds since 1970, as ISO 8601 in UTC; *precision* as for `datetime.isoformat`."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec=precision).replace("+00:00", "Z")
