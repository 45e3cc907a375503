"""Small files of the kinds that are uploaded."""

import zlib

PAGE = (
    "<html><head><title>not this</title><style>p {}</style></head><body><h1>Names</h1>"
    "<p>Anna <b>lives</b>\n in Lisbon.<br>Karl in Oslo.</p><!-- nor this --><script>nor(this)</script>"
    "<ul><li>one</li><li>t<i>w</i>o</li></ul><table><tr><td>a</td><td>b</td></tr></table>"
    "<pre>x\n  y</pre>end</body></html>"
)
TEXT_OF_PAGE = "Names\n\nAnna lives in Lisbon.\nKarl in Oslo.\n\none\ntwo\n\na | b\n\nx\n  y\n\nend"


def pdf(*pages: str, content: bytes | None = None) -> bytes:
    """A PDF file with a line on each page, or with this compressed content on each."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>"]
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects.append(f"<< /Type /Pages /Count {len(pages)} /Kids [{kids}] >>")
    objects.append("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    streams = {}
    for i, line in enumerate(pages):
        stream = zlib.compress(content or f"BT /F1 12 Tf 50 700 Td ({line}) Tj ET".encode())
        resources = "<< /Font << /F1 3 0 R >> >>"
        objects.append(f"<< /Type /Page /Parent 2 0 R /Resources {resources} /Contents {5 + 2 * i} 0 R >>")
        objects.append(f"<< /Length {len(stream)} /Filter /FlateDecode >>")
        streams[len(objects)] = stream
    return _file(objects, streams)


def _file(objects: list[str], streams: dict[int, bytes]) -> bytes:
    written, offsets = b"%PDF-1.4\n", []
    for number, text in enumerate(objects, 1):
        offsets.append(len(written))
        stream = b"stream\n" + streams[number] + b"\nendstream\n" if number in streams else b""
        written += f"{number} 0 obj\n{text}\n".encode() + stream + b"endobj\n"
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    head = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    trailer = f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(written)}\n%%EOF"
    return written + (head + trailer).encode()
