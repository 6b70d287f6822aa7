"""How secrets are kept: a text that tells its scheme and cannot be turned back.

- `$argon2id$…`  passwords and tokens that came from outside, whatever they are: slow on purpose.
- `$random$…`    secrets that Fleetlift itself drew from at least 32 random bytes. There is nothing to
                 guess, so a salted BLAKE2b is as safe, and a fleet of thousands signs in without a queue.
"""

import hmac
import secrets
from base64 import b64decode, b64encode
from hashlib import blake2b

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

# The second choice of RFC 9106 (section 4) uses 64 MiB; a server that greets hundreds of devices a second
# cannot. 19 MiB and two passes are what OWASP's password storage cheat sheet gives as the least.
_ARGON2 = PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)
_RANDOM = "$random$"


def generate_secret() -> str:
    """A new secret of 32 random bytes, as text."""
    return secrets.token_urlsafe(32)


def hash_password(secret: str) -> str:
    """For secrets from outside. Takes some 20 ms of one core: keep it off the event loop."""
    return _ARGON2.hash(secret)


def hash_generated(secret: str) -> str:
    """For secrets that Fleetlift made of at least 32 random bytes, and no others."""
    salt = secrets.token_bytes(16)
    return f"{_RANDOM}{b64encode(salt).decode()}${b64encode(_digest(secret, salt)).decode()}"


def is_cheap(stored: str) -> bool:
    """True when `verify` takes microseconds."""
    return stored.startswith(_RANDOM)


def verify(stored: str, secret: str) -> bool:
    """Whether `secret` is what was hashed; False too for a text that is no hash of ours."""
    if not is_cheap(stored):
        try:
            return _ARGON2.verify(stored, secret)
        except (VerificationError, InvalidHashError, UnicodeEncodeError):
            return False
    try:
        salt, digest = (b64decode(part) for part in stored[len(_RANDOM) :].split("$"))
        return hmac.compare_digest(digest, _digest(secret, salt))
    except (ValueError, UnicodeEncodeError):
        return False


def _digest(secret: str, salt: bytes) -> bytes:
    return blake2b(secret.encode(), key=salt, digest_size=32).digest()
