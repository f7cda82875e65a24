"""Model cards: README.md of a model folder, with the metadata that Hugging Face's hub reads. No TensorFlow."""

import hashlib
import json

CARD_FILE = "README.md"
PAPERS = {"variable_rate": ["2002.10032", "2009.13074"], "crpe": ["2002.10032", "2209.03353"]}  # on arXiv
MEASURES = (("psnr", "PSNR RGB, dB", "psnr-rgb", 3), ("ms-ssim", "MS-SSIM RGB", "ms-ssim-rgb", 5))


def metadata(info) -> dict:
    """A card's metadata from a `zoo.ModelInfo`; "license" and results on Kodak are there if its own card has them."""
    found = {"license": info.card["license"]} if info.card.get("license") else {}
    found.update(library_name="goconv_tf", pipeline_tag="image-to-image")
    tags = ["image-compression", "learned-image-compression", info.model]
    found["tags"] = tags + [f"arxiv:{number}" for number in PAPERS.get(info.model, [])]
    metrics = []
    for row in info.card.get("kodak", []):
        at = f"at {row['bpp']:.4f} bpp"
        for kind, title, key, digits in MEASURES:
            if row.get(key) is not None:
                metrics.append({"type": kind, "name": f"{title}, {at}", "value": round(row[key], digits)})
    if metrics:
        task = {"type": "image-to-image", "name": "Image compression"}
        dataset = {"type": "kodak", "name": "Kodak"}
        found["model-index"] = [{"name": info.name, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}]
    return found


def front_matter(info) -> str:
    """`metadata` as the YAML block that a card begins with; its values are JSON, which is YAML too."""
    lines = [f"{key}: {json.dumps(value)}" for key, value in metadata(info).items()]
    return "\n".join(["---", *lines, "---", ""])


def _signed(text) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{text}\n<!-- Written by goconv_tf, which writes it anew unless you change it: {digest} -->\n"


def is_default(text) -> bool:
    """Whether a card is as `default_card` made it, of whatever version and weights."""
    return text == _signed(text.rpartition("\n<!-- ")[0])


def default_card(info) -> str:
    """The card of a model that nobody has written one for."""
    notes = info.card.get("notes", "")
    return _signed(f"""{front_matter(info)}
# {info.name}

{info.model}, {info.config.rates_text}, fingerprint {info.fingerprint}: learned image compression with goconv_tf.
{notes and f"{chr(10)}{notes}{chr(10)}"}
```python
import goconv_tf

model = goconv_tf.load_pretrained("...")  # this folder, or hf://ORGANISATION/NAME
data = goconv_tf.compress(model, goconv_tf.read_picture("photo.png")).data
```

How it was trained, and what was measured, is in `config.json`.
""")
