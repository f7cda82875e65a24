"""Measures, results files, BD-rates, plots."""

import json
import math
import os
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from conftest import draw
from PIL import Image
from skimage.color import rgb2ycbcr
from test_commands import one_line

from goconv_tf import evaluation, losses, memory, metrics, plots, presets, published
from goconv_tf.errors import GoConvError, UsageError


def test_measures_agree_with_independent_ones():
    a = draw(170, 190)
    b = np.clip(a.astype(int) + np.random.default_rng(0).integers(-9, 9, a.shape), 0, 255).astype(np.uint8)
    assert metrics.psnr(a, b) == pytest.approx(float(tf.image.psnr(a, b, 255)), abs=1e-4)
    assert metrics.ms_ssim(a, b) == pytest.approx(float(tf.image.ssim_multiscale(a, b, 255)), abs=1e-5)
    # Pillow's YCbCr is JPEG's, rounded to 8 bits; scikit-image's is BT.601 in studio range.
    np.testing.assert_allclose(metrics.yuv(a), np.asarray(Image.fromarray(a).convert("YCbCr")), atol=1.01)
    studio = rgb2ycbcr(a)
    np.testing.assert_allclose(metrics.yuv(a)[..., 0], (studio[..., 0] - 16) * 255 / 219, atol=0.01)
    np.testing.assert_allclose(metrics.yuv(a)[..., 1:], (studio[..., 1:] - 128) * 255 / 224 + 128, atol=0.01)
    np.testing.assert_allclose(metrics.yuv(a)[..., 0], losses.luma(tf.constant(a, tf.float32))[..., 0], atol=1e-3)
    q = metrics.quality(a, b)
    assert q["psnr-yuv"] == pytest.approx((6 * q["psnr-y"] + q["psnr-u"] + q["psnr-v"]) / 8)
    assert q["psnr-y"] == pytest.approx(10 * math.log10(255**2 / np.mean((metrics.yuv(a)[..., 0] - metrics.yuv(b)[..., 0]) ** 2)))
    assert metrics.decibels(0.99) == pytest.approx(20)
    assert metrics.quality(a, a)["psnr-rgb"] == math.inf and math.isnan(metrics.ms_ssim(a[:160], b[:160]))
    grey = metrics.quality(*(np.repeat(picture[..., :1], 3, axis=-1) for picture in (a, b)))
    assert grey["psnr-u"] == grey["psnr-v"] == math.inf and grey["psnr-y"] == pytest.approx(grey["psnr-rgb"])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for k, size in enumerate(((165, 170), (170, 165))):
        Image.fromarray(draw(*size, k)).save(folder / f"{k}.png")
    return str(folder)


def test_evaluate_resumes_after_any_interruption(model, model_dir, pictures, tmp_path, monkeypatch):
    specs = [("model", model_dir, "tfc", 3), ("codec", "jpeg")]
    calls = []
    original = evaluation.ModelSubject.code

    def counted(self, picture, point):
        calls.append(point)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, picture, point)

    monkeypatch.setattr(evaluation.ModelSubject, "code", counted)
    monkeypatch.setattr(evaluation, "_subjects", {})
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(specs, pictures, str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["measured.jsonl"]
    with open(tmp_path / "measured.jsonl", "ab") as f:
        f.write(b'{"key": "half a li')
    paths = evaluation.evaluate(specs, pictures, str(tmp_path), per_image=True, as_csv=True)
    assert len(calls) == 4 + 3  # 6 codings, of which 3 were kept
    before = [pathlib.Path(path).read_text() for path in paths]
    evaluation.evaluate(specs, pictures, str(tmp_path))
    assert len(calls) == 7 and before == [pathlib.Path(path).read_text() for path in paths]

    data = json.loads(before[0])
    assert set(data) == {"name", "description", "meta", "results"}
    results = data["results"]
    assert {*evaluation.MEASURES, "bpp-strings", "bpp-estimated", "lmbda"} <= set(results)
    assert {len(values) for values in results.values()} == {3} and results["bpp"] == sorted(results["bpp"])
    assert 0 < results["ms-ssim-rgb"][0] < 1 and results["bpp-strings"][0] < results["bpp"][0]
    assert results["bpp-estimated"][-1] == pytest.approx(results["bpp-strings"][-1], rel=0.05)
    per_image = [json.loads((tmp_path / "per_image" / "tiny-test" / f"{k}.json").read_text()) for k in range(2)]
    assert per_image[1]["source"] == "1"

    def by_lambda(found, name):
        return np.array(found[name])[np.argsort(found["lmbda"])]  # each is sorted by its own bpp

    for name in results:
        np.testing.assert_allclose(
            by_lambda(results, name), np.mean([by_lambda(p["results"], name) for p in per_image], axis=0), rtol=1e-6, err_msg=name
        )
    text = (tmp_path / "csv" / os.path.basename(pictures) / "PSNR_sRGB_Y" / "tiny-test.txt").read_text()
    rows = np.loadtxt(text.splitlines(), delimiter=",", comments="#")
    np.testing.assert_allclose(rows, np.transpose([results["bpp"], results["psnr-y"]]), atol=1e-6)
    # Weights that change under way are not measured in the others' name.
    subject = evaluation.ModelSubject(model_dir)
    subject.info = subject.info._replace(fingerprint="00000000")
    with pytest.raises(GoConvError, match="by now, not 00000000"):
        subject.code(draw(32, 32), {"lmbda": 0.02})
    with pytest.raises(GoConvError, match="changed while it was measured"):
        evaluation._measure_task(specs[0], "tiny-test 00000000 tfc", os.path.join(pictures, "0.png"), {"lmbda": 0.02})
    # Each once, however often it is asked for.
    assert len(evaluation.Store(str(tmp_path / "measured.jsonl")).rows) == 6 + 2 * len(evaluation.CODECS["jpeg"][3])


def test_jobs_give_the_same_figures(pictures, model_dir, tmp_path):
    for jobs in (1, 2):
        evaluation.evaluate([("codec", "webp"), ("model", model_dir, "tfc", 1)], pictures, str(tmp_path / str(jobs)), jobs=jobs)
    for results in ("webp.json", "tiny-test.json"):
        one, two = (json.loads((tmp_path / str(jobs) / results).read_text())["results"] for jobs in (1, 2))
        for name in one:
            if not name.endswith("time"):
                assert one[name] == two[name], (results, name)


@pytest.mark.parametrize("name", ["jpeg", "jpeg2000", "webp", "avif"])
def test_other_codecs(name, pictures, tmp_path):
    subject = evaluation.PillowSubject(name)
    subject.points = subject.points[::5]
    rows = [evaluation.measure(subject, os.path.join(pictures, "0.png"), point) for point in subject.points]
    rates, quality = ([row[key] for row in rows] for key in ("bpp", "psnr-rgb"))
    assert rates == sorted(rates) and quality == sorted(quality) and len(set(rates)) == len(rates)
    assert "Pillow" in subject.description and subject.meta["settings"]


def test_what_is_not_defined_is_null_with_a_reason(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(draw(100, 170)).save(folder / "0.png")
    Image.fromarray(draw(165, 170)).save(folder / "1.png")
    path = evaluation.evaluate([("codec", "jpeg")], str(folder), str(tmp_path / "out"))[0]
    data = json.loads(pathlib.Path(path).read_text(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert data["results"]["ms-ssim-rgb"] == [None] * len(data["results"]["bpp"])
    assert data["meta"]["null"]["ms-ssim-rgb"] == "not defined for 1 of 2 pictures: a side is under 161 pixels"
    assert all(value > 10 for value in data["results"]["psnr-rgb"])
    assert evaluation.read_results(path)["results"]["ms-ssim-rgb"] == []


def curve(name, points):
    return {"name": name, "results": {"psnr-rgb": points, "ms-ssim-rgb": [(rate, 1 - 10 ** (-quality / 20)) for rate, quality in points]}}


def test_bits_at_equal_quality():
    """Of one point, against a curve: exact on points, monotone between them."""
    anchor = curve("a", [(0.1, 25.0), (0.2, 28.0), (0.4, 31.0), (0.8, 34.0)])
    for rate, quality in ((0.05, 25.0), (0.4, 34.0)):
        for metric in ("psnr-rgb", "ms-ssim-rgb"):
            assert evaluation.bits_at_equal_quality(anchor, curve("b", [(rate, quality)]), metric) == "-50.0%"
    for rate, quality, expected in ((0.2, 28.0, "+0.0%"), (0.3, 31.0, "-25.0%"), (0.3, 29.5, "+6.1%"), (0.1, 24.0, "out of its range")):
        for metric in ("psnr-rgb", "ms-ssim-rgb"):
            assert evaluation.bits_at_equal_quality(anchor, curve("b", [(rate, quality)]), metric) == expected
    assert evaluation.bits_at_equal_quality(curve("a", []), curve("b", [(0.1, 25.0)])) == "not measured"
    assert evaluation.bits_at_equal_quality(anchor, {"name": "b", "results": {"ms-ssim-rgb": [(0.1, 1.0)]}}, "ms-ssim-rgb") == "not measured"
    assert evaluation.bits_at_equal_quality(curve("a", [(0.1, 25.0)]), curve("b", [(0.1, 25.0)])) == "a has one point only"


def test_other_pictures_do_not_compare():
    anchor = curve("a", [(0.1, 25.0), (0.2, 28.0), (0.4, 31.0)])
    for meta in ({"pixels": "x", "pictures": 4}, {"pixels": "y", "pictures": 5}):
        mine = {**anchor, "meta": {"pixels": "x", "pictures": 5}}
        assert "different pictures" in evaluation.bits_at_equal_quality(mine, {**curve("b", [(0.2, 28.0)]), "meta": meta})
    assert evaluation.bits_at_equal_quality(mine, {**curve("b", [(0.2, 28.0)]), "meta": mine["meta"]}) == "+0.0%"
    assert "different pictures" in evaluation.other_pictures(published.curve("kodak", "bpg444"), {**anchor, "meta": {"dataset": "mine"}})


def test_pictures_that_differ_in_their_extension(tmp_path):
    """Files of results are not named after pictures, unless they are asked for; what begins with a dot is none of them."""
    folder, output = tmp_path / "in", str(tmp_path / "out")
    folder.mkdir()
    Image.fromarray(draw(32, 40)).save(folder / "a.png")
    Image.fromarray(draw(32, 40, 1)).save(folder / "a.bmp")
    (folder / "._a.png").write_bytes(b"what a Mac keeps beside it")
    path = evaluation.evaluate([("codec", "jpeg")], str(folder), output)[0]
    assert json.loads(pathlib.Path(path).read_text())["meta"]["pictures"] == 2
    with pytest.raises(UsageError, match="the same name but for the extension"):
        evaluation.evaluate([("codec", "jpeg")], str(folder), output, per_image=True)


def test_seconds_say_whose_they_are(tmp_path, monkeypatch):
    Image.fromarray(draw(32, 40)).save(tmp_path / "a.png")
    output = str(tmp_path / "out")

    def machine():
        return json.loads(pathlib.Path(evaluation.evaluate([("codec", "jpeg")], str(tmp_path), output)[0]).read_text())["meta"]["machine"]

    assert machine() == evaluation.this_machine() and f"{os.cpu_count()} cores" in machine()
    monkeypatch.setattr(evaluation, "this_machine", lambda: "another")
    assert machine() != "another"  # nothing was measured there
    lines = pathlib.Path(output, "measured.jsonl").read_text().splitlines()
    pathlib.Path(output, "measured.jsonl").write_text("\n".join(lines[1:]))
    assert machine().split(" and ")[-1] == "another"


def test_a_range_of_one_lambda_is_one_point():
    config = presets.get_preset("variable_rate", "tiny")
    assert len(evaluation.operating_points(config)) == 8
    assert evaluation.operating_points(config.adapt(lambdas=[0.02])) == [{"lmbda": 0.02}]


def test_bd_rate():
    anchor = curve("a", [(0.1, 25.0), (0.2, 28.0), (0.4, 31.0), (0.8, 34.0)])
    fewer = curve("b", [(0.9 * rate, quality) for rate, quality in anchor["results"]["psnr-rgb"]])
    for metric in ("psnr-rgb", "ms-ssim-rgb"):
        assert evaluation.bd_rate(anchor, fewer, metric).rate == pytest.approx(-10, abs=1e-6)
        assert evaluation.bd_rate(fewer, anchor, metric).rate == pytest.approx(100 / 9, abs=1e-5)
    assert evaluation.bd_rate(anchor, anchor).overlap == (25.0, 34.0)
    better = curve("c", [(rate, quality + 20) for rate, quality in anchor["results"]["psnr-rgb"]])
    with pytest.raises(GoConvError, match=r"do not overlap: a has psnr-rgb 25.00 to 34.00, c 45.00 to 54.00 dB"):
        evaluation.bd_rate(anchor, better)
    with pytest.raises(GoConvError, match="needs three"):
        evaluation.bd_rate(anchor, curve("d", [(0.1, 25.0), (0.2, 24.0), (0.3, 26.0)]))
    # Uneven points do not make the interpolation swing out: a scalable model's four, all of which need fewer bits than JPEG (MS-SSIM, dB).
    jpeg = [
        (0.141, 7.15),
        (0.256, 9.76),
        (0.359, 11.4),
        (0.449, 12.65),
        (0.61, 14.34),
        (0.743, 15.48),
        (0.869, 16.36),
        (1.005, 17.13),
        (1.213, 18.16),
    ]
    uneven = [(0.302, 12.34), (0.396, 12.98), (0.448, 13.13), (0.752, 16.59)]
    assert -20 < evaluation.bd_rate(curve("jpeg", jpeg), curve("uneven", uneven)).rate < -5
    # Other pictures are no comparison.
    kodak, tecnick = ({**anchor, "meta": {"dataset": name, "pictures": 24, "pixels": pixels}} for name, pixels in (("kodak", "a"), ("tecnick", "b")))
    with pytest.raises(GoConvError, match="different pictures: 24 of 'kodak' and 24 of 'tecnick'"):
        evaluation.bd_rate(kodak, tecnick)
    assert evaluation.bd_rate(kodak, anchor).rate == pytest.approx(0, abs=1e-6)
    # A published figure: BPG 4:4:4 against JPEG on Kodak is some -57 % over 0.08 to 2.2 bpp.
    jpeg, bpg = (published.curve("kodak", name) for name in ("jpeg", "bpg444"))
    assert evaluation.bd_rate(jpeg, bpg).rate == pytest.approx(-58, abs=2)


def test_published_curves():
    for dataset in published.DATASETS:
        for name in published.names(dataset):
            data = published.curve(dataset, name)
            assert data["source"] and data["results"]
            for metric, points in data["results"].items():
                assert all(0 < rate < 10 and (15 < value < 60 if metric == "psnr-rgb" else 0 < value < 1) for rate, value in points), (name, metric)
    with pytest.raises(UsageError, match="bpg444"):
        published.curve("kodak", "nothing")


def test_plots_tell_the_subject_from_codecs_and_published_curves():
    """Bold with points; thin; dashed. The rate axis ends by the subject, not by a codec's last point."""
    points = {"psnr-rgb": [(0.2, 30.0), (1.0, 36.0)]}
    own = {"name": "mine", "results": points, "meta": {}}
    codec = {"name": "jpeg", "results": {"psnr-rgb": [(0.3, 30.0), (9.0, 36.0)]}, "meta": {"codec": "jpeg"}}
    curves = [own, codec, published.curve("kodak", "bpg444")]
    svg = [plots.rate_distortion_svg(curves[:k], measures=["psnr-rgb"]) for k in (1, 2, 3)]
    assert ["stroke-dasharray" in text for text in svg] == [False, False, True]
    assert ["stroke-width: 0.9" in text for text in svg] == [False, True, True]
    assert all("<!-- 1.2 -->" in text and "<!-- 2.0 -->" not in text for text in svg)


def test_plots_leave_pyplot_to_its_users():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.figure()
    before, backend = pyplot.get_fignums(), pyplot.get_backend()
    points = {"psnr-rgb": [(0.2, 30.0), (1.0, 36.0)]}
    legends = [plots.rate_distortion_svg([{"name": name, "results": points}]).count('id="line2d_') for name in ("mine", "_mine")]
    assert legends[0] == legends[1]  # Matplotlib leaves names with an underscore out
    assert pyplot.get_fignums() == before and pyplot.get_backend() == backend
    pyplot.close()


def test_measuring_says_when_memory_is_short(model_dir, monkeypatch):
    subject = evaluation.ModelSubject(model_dir)
    monkeypatch.setattr(memory, "available_memory", lambda: metrics.QUALITY_BYTES * 170 * 180 - 1)
    with pytest.raises(GoConvError, match="measures of 180 x 170 pixels need about"):
        evaluation.measure_picture(subject, draw(170, 180), {})


def test_commands(command, command_here, pictures, tmp_path):
    results = tmp_path / "results"
    done = command("evaluate", "--model", "tiny-test", "--points", 4, pictures, "--output", results)
    assert done.returncode == 0 and "4 points" in done.stdout, done.stderr
    done = command_here("bench_codec", "jpeg", pictures, "--output", results)
    assert done.returncode == 0, done.stderr
    done = command_here("plot", results / "tiny-test.json", results / "jpeg.json", "kodak:bpg444", "-o", tmp_path / "rd.png")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "rd.png") as image:
        assert image.width > 1000
    done = command_here("bd_rate", "kodak:jpeg", "kodak:bpg444")
    assert done.returncode == 0 and "% bits of BPG 4:4:4 against JPEG" in done.stdout
    done = command_here("plot", results / "jpeg.json", "kodak:bpg444", "-o", tmp_path / "rd.png")
    assert done.stderr.count("note: BPG 4:4:4 is of different pictures") == 1
    (tmp_path / "bad.json").write_text('{"results": 3}')
    (tmp_path / "deep.json").write_text(100_000 * "[")
    (tmp_path / "meta.json").write_text('{"results": {"bpp": []}, "meta": 3}')
    # A picture that a codec gives back as it was has an MS-SSIM of 1, which is not finite in dB.
    whole = {"name": "whole", "results": {"bpp": [0.1, 0.2, 0.3, 0.4], "psnr-rgb": [30, 32, 34, 36], "ms-ssim-rgb": [0.9, 0.95, 0.97, 1.0]}}
    (tmp_path / "whole.json").write_text(json.dumps(whole))
    assert command_here("plot", tmp_path / "whole.json", "-o", tmp_path / "whole.png").returncode == 0
    for name, changes in (
        ("zero", {"results": {**whole["results"], "bpp": [0, 0.2, 0.3, 0.4]}}),
        ("name", {"name": 5}),
        ("codec", {"meta": {"codec": "heif"}}),
        ("list", {"meta": {"codec": ["heif"]}}),
        ("huge", {"results": {**whole["results"], "bpp": [10**400, 0.2, 0.3, 0.4]}}),
        ("path", {"name": "hf://some/one", "meta": {"model": "crpe", "fingerprint": "0" * 8}}),
        ("endless", {"results": {**whole["results"], "bpp": [0.1, 0.2, 0.3, math.inf]}}),
        ("large", {"results": {**whole["results"], "bpp": [0.1, 0.2, 0.3, 1.7e308]}}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps({**whole, **changes}))
    done = command_here("plot", tmp_path / "name.json", "--title", r"$\b$", "-o", tmp_path / "name.png")
    assert done.returncode == 0, done.stderr
    done = command_here("bd_rate", tmp_path / "whole.json", tmp_path / "whole.json", "--metric", "ms-ssim-rgb")
    assert done.returncode == 0 and "+0.0" in done.stdout, done
    for args, word in (
        (("bd_rate", tmp_path / "bad.json", "kodak:vtm"), "not a results file"),
        (("bd_rate", tmp_path / "none.json", "kodak:vtm"), "no such file"),
        (("bd_rate", "kodak:vtm", "kodak:nothing"), "no published curve"),
        (("bd_rate", results / "jpeg.json", "kodak:bpg444"), "BPG 4:4:4 is of different pictures, kodak"),
        (("bd_rate", "tecnick:jpeg420", "kodak:bpg444"), "different pictures"),
        (("plot", results / "jpeg.json", "-o", tmp_path / "x.txt"), "unknown plot format"),
        (("report", results / "jpeg.json", "-o", results / "tiny-test.json"), "ends in .html"),
        (("bd_rate", tmp_path / "zero.json", "kodak:vtm"), "rates must be above 0"),
        (("report", tmp_path / "codec.json", "--images", pictures, "-o", tmp_path / "x.html"), "unknown codec 'heif'"),
        (("report", tmp_path / "list.json", "--images", pictures, "-o", tmp_path / "x.html"), "not a results file"),
        (("report", tmp_path / "path.json", "--images", pictures, "-o", tmp_path / "x.html"), "is no name for a model"),
        (("plot", tmp_path / "huge.json", "-o", tmp_path / "x.png"), "below a billion"),
        (("plot", tmp_path / "large.json", "-o", tmp_path / "x.png"), "below a billion"),
        (("plot", tmp_path / "deep.json", "-o", tmp_path / "x.png"), "not a results file"),
        (("plot", tmp_path / "meta.json", "-o", tmp_path / "x.png"), "not a results file"),
        (("evaluate", "--model", "nothing", pictures), "no model"),
        (("evaluate", "--model", "tiny-test", tmp_path), "transparency"),
        (("evaluate", "--model", "tiny-test", results), "no files"),
    ):
        assert word in one_line(command_here(*args)), args


def test_points_that_fall_back_are_none_of_a_curve():
    points = [(0.1, 25.0), (0.2, 23.0), (0.3, 24.0), (0.4, 26.0)]
    assert evaluation.rising_points(curve("a", points), "psnr-rgb") == [points[0], points[3]]


def test_the_share_of_both_ranges_that_was_compared():
    anchor = curve("a", [(0.1, 25.0), (0.2, 28.0), (0.4, 31.0), (0.8, 34.0)])
    shifted = curve("b", [(rate, quality + 3) for rate, quality in anchor["results"]["psnr-rgb"]])
    result = evaluation.bd_rate(anchor, shifted)
    assert (result.overlap, result.share) == ((28.0, 34.0), pytest.approx(0.5))


def test_a_picture_that_was_replaced_is_measured_again(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    found = []
    for seed in (0, 1, 0):
        Image.fromarray(draw(40, 50, seed)).save(folder / "0.png")
        path = evaluation.evaluate([("codec", "jpeg")], str(folder), str(tmp_path / "out"))[0]
        found.append(json.loads(pathlib.Path(path).read_text())["results"])
    assert found[0] == found[2] and found[0]["psnr-rgb"] != found[1]["psnr-rgb"]


@pytest.mark.parametrize("shape", [(512, 200, 3), (1, 200, 3), (256, 1, 3), (256, 200, 1)])
def test_pictures_of_other_shapes_do_not_compare(shape):
    a, b = np.zeros([256, 200, 3], np.uint8), np.zeros(shape, np.uint8)
    for measure in (metrics.mse, metrics.psnr, metrics.ms_ssim, metrics.quality):
        for pair in ((a, b), (b, a)):
            with pytest.raises(ValueError, match="different shapes"):
                measure(*pair)


def test_mean_squared_error_of_many_rows():
    a, b = np.random.default_rng(0).integers(0, 256, (2, 600, 5, 3)).astype(np.uint8)
    assert metrics.mse(a, b) == pytest.approx(np.mean(np.square(a.astype(float) - b)))
