"""The page at `/`, one file of HTML with its style and script in it, and what a browser may do with it."""

from base64 import b64encode
from hashlib import sha256
from pathlib import Path

FOLDER = Path(__file__).parent


def _hash_source(text: str) -> str:
    """How a Content-Security-Policy allows this text, and no other, as a style or a script."""
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


STYLE, SCRIPT = (f"\n{(FOLDER / name).read_text(encoding='utf-8')}" for name in ("page.css", "page.js"))
PAGE = (
    (FOLDER / "page.html")
    .read_text(encoding="utf-8")
    .replace('<link rel="stylesheet" href="page.css">', f"<style>{STYLE}</style>")
    .replace('<script src="page.js"></script>', f"<script>{SCRIPT}</script>")
)
HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src {_hash_source(STYLE)}; "
    f"script-src {_hash_source(SCRIPT)}; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
