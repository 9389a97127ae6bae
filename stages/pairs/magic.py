"""What kind of file some bytes are, told by how they begin; for messages, and for base64."""

# Those that Pillow reads without another package.
IMAGES = ("JPEG", "PNG", "GIF", "WebP", "BMP", "TIFF", "PPM", "AVIF", "JPEG 2000")
# Of a file of the MP4 family, by what its first box says it is or is compatible with.
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1"), "HEIC"),
    b"crx ": "Canon raw photo (CR3)",
}
# Where, what, which. The first that fits counts.
_MAGIC = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"\x8aMNG", "MNG"),
    (0, b"GIF8", "GIF"),
    (8, b"WEBP", "WebP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "BigTIFF"),
    (0, b"MM\0+", "BigTIFF"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"8BPS", "Photoshop (PSD)"),
    (0, b"%PDF", "PDF"),
    (0, b"%!PS", "PostScript"),
    (0, b"\xc5\xd0\xd3\xc6", "PostScript (EPS)"),
    (0, b"gimp xcf", "GIMP (XCF)"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"\0\0\2\0", "CUR"),
    (0, b"DDS ", "DDS"),
    (0, b"qoif", "QOI"),
    (0, b"v/1\1", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"SIMPLE  =", "FITS"),
    (128, b"DICM", "DICOM"),
    (8, b"AVI ", "AVI video"),
    (0, b"\x1aE\xdf\xa3", "Matroska or WebM video"),
    (0, b"icns", "ICNS"),
    (0, b"\x93NUMPY", "NumPy array"),
    (0, b"PK\3\4", "zip archive"),
    (0, b"\x1f\x8b", "gzip"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (0, b"version https://git-lfs.github.com/", "Git LFS pointer"),
    *((0, b"P%d" % number, "PPM") for number in range(1, 8)),
    (0, b"BM", "BMP"),
)


def format_of(data: bytes) -> str:
    """``"JPEG"``, ``"HEIC"``, ``"PDF"``, …; empty if the beginning says nothing."""
    if data[4:8] == b"ftyp":
        brands = data[8 : min(int.from_bytes(data[:4], "big"), 200)]
        found = [brands[i : i + 4] for i in range(0, len(brands), 4) if i != 4]  # 4: a version
        return next((name for brand, name in _BRANDS.items() if brand in found), "MP4 video")
    for place, magic, name in _MAGIC:
        if data.startswith(magic, place):
            return name
    start = data[:300].lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "HTML page"
    if start.startswith((b"<svg", b"<?xml")):
        return "SVG" if b"<svg" in data[:2000].lower() else "XML"
    if start.startswith((b"{", b"[")):
        return "JSON text"
    return ""
