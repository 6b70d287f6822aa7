"""The devices that a load test signs in as, from a file that only its owner can read."""

import csv
import stat
from pathlib import Path
from typing import Final

import msgspec

from fleetlift.core.errors import BadInput, Forbidden

FILE_MOST: Final = 256 * 1024 * 1024
_EXPECTED: Final = 'expected device,password or {"device": …, "password": …} on each line'


class Login(msgspec.Struct, frozen=True):
    """A device and its password; an empty one: it signs in by its id alone."""

    device: str
    password: str = ""

    def __repr__(self) -> str:
        return f"Login({self.device!r}, …)"


def read_credentials(path: Path) -> list[Login]:
    """The logins in a file of CSV or JSON lines. Raises BadInput, or Forbidden when others may read it."""
    try:
        mode = path.stat().st_mode
        if stat.S_IMODE(mode) & 0o077:
            raise Forbidden(f"{path} holds passwords, and others may read it: chmod 600 {path}")
        if path.stat().st_size > FILE_MOST:
            raise BadInput(f"{path}: at most {FILE_MOST // 1024**2} MiB are read")
        text = path.read_text()
    except OSError as exc:
        raise BadInput(f"{path}: the credentials cannot be read: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise BadInput(f"{path}: credentials are UTF-8 text") from exc
    found: list[Login] = []
    seen: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        login = _login(line, f"{path}:{number}")
        if number == 1 and login == Login("device", "password"):
            continue  # a heading
        if login.device in seen:
            raise BadInput(f"{path}:{number}: {login.device!r} is there twice")
        seen.add(login.device)
        found.append(login)
    if not found:
        raise BadInput(f"{path} names no device: {_EXPECTED}")
    return found


def _login(line: str, where: str) -> Login:
    if line.lstrip().startswith("{"):
        try:
            login = msgspec.json.decode(line, type=Login)
        except msgspec.MsgspecError:
            raise BadInput(f"{where}: {_EXPECTED}") from None  # the line itself is a secret
    else:
        parts = next(csv.reader([line]), [])
        if len(parts) not in (1, 2):
            raise BadInput(f"{where}: {_EXPECTED}")
        login = Login(*(part.strip() for part in parts))
    if not login.device:
        raise BadInput(f"{where}: the device's id is empty; {_EXPECTED}")
    return login
