"""What pictures of runs show: panels, lines, labels and marks, asked of matplotlib's objects."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from spikingbrain_train.errors import ConfigurationError, DataError, PlatformError
from spikingbrain_train.reporting.plots.dense_line import DenseLine
from spikingbrain_train.reporting.plots.panels import views_of
from spikingbrain_train.reporting.plots.picture import draw_picture
from spikingbrain_train.reporting.plots.plot import plot_runs
from spikingbrain_train.reporting.plots.recording import Axis, Recording
from spikingbrain_train.reporting.plots.rows import arrange
from spikingbrain_train.reporting.plots.views import Options
from tests.reporting.recordings import OTHER_TEXT, TEXT, checkpoint_of, write_run

STEADY = [5.0 - 0.01 * number for number in range(200)]


def drawn(*folders: Path, **settings: Any) -> dict[str, Axes]:
    """The panels of a picture by their titles."""
    figure = figure_of(*folders, **settings)
    return {panel.get_title("left"): panel for panel in figure.get_axes() if panel.get_title("left")}


def figure_of(
    *folders: Path, compare: bool = False, axis: Axis = Axis.tokens, panels: Any = None, metrics: Any = (),
    options: Options | None = None,
) -> Any:  # fmt: skip
    options = options or Options()
    row = arrange([Recording.read(folder) for folder in folders], axis, compare=compare)
    figure = draw_picture(row, views_of(row, panels, metrics, options), options)
    figure.draw_without_rendering()
    return figure


def labels(panel: Axes) -> list[str]:
    legend = panel.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def texts(panel: Axes) -> list[str]:
    return [text.get_text() for text in panel.texts]


def line(panel: Axes, label: str) -> tuple[list[float], list[float]]:
    (found,) = [each for each in panel.get_lines() if each.get_label() == label]
    return [float(x) for x in found.get_xdata()], [float(y) for y in found.get_ydata()]


def test_one_run_shows_training_and_held_out_cross_entropy_over_tokens(tmp_path: Path) -> None:
    (panel,) = drawn(write_run(tmp_path / "run")).values()
    assert panel.get_title("left") == "Cross entropy"
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("tokens read", "nats per token")
    assert line(panel, "training") == ([1000, 2000, 3000], [5.0, 4.5, 4.0])
    assert line(panel, "held-out") == ([0, 3000], [6.0, 4.0])
    assert texts(panel) == ["6", "4"]
    assert "3k" in [text.get_text() for text in panel.get_xticklabels()]


def test_stages_lie_end_to_end_under_their_names(tmp_path: Path) -> None:
    align = write_run(tmp_path / "align", stage="align", valid={0: 6.0, 30: 5.0})
    cpt = write_run(tmp_path / "cpt", (4.9, 4.5, 4.0), load=checkpoint_of(align), valid={0: 5.0, 30: 4.0})
    panels = drawn(cpt, align)
    assert list(panels) == ["Cross entropy", "Training loss: alignment error"]
    assert {"align", "cpt"} <= set(texts(panels["Cross entropy"]))
    curves = [list(each.get_xdata()) for each in panels["Cross entropy"].get_lines()]
    assert [0.0, 3000.0] in curves and [3000.0, 6000.0] in curves
    alignment = panels["Training loss: alignment error"]
    assert alignment.get_xlabel() == "tokens read (align)" and alignment.get_xlim()[1] < 3100


def test_a_short_stage_among_long_ones_keeps_a_seventh_of_the_axis(tmp_path: Path) -> None:
    align = write_run(tmp_path / "align")
    cpt = write_run(tmp_path / "cpt", STEADY, load=checkpoint_of(align))
    panel = drawn(align, cpt)["Cross entropy"]
    assert panel.get_xlabel().endswith("each stage to its own scale")
    left, boundary, right = (panel.transData.transform((x, 4.0))[0] for x in (0, 3000, 203_000))
    assert 0.13 < (boundary - left) / (right - left) < 0.15
    shown = [text.get_text() for text in panel.get_xticklabels()]
    assert {"0", "3k", "203k"} <= set(shown)


def test_later_stages_get_a_panel_of_their_own_where_the_first_would_squeeze_them(tmp_path: Path) -> None:
    align = write_run(tmp_path / "align", stage="align", valid={0: 12.0, 30: 5.1})
    cpt = write_run(tmp_path / "cpt", load=checkpoint_of(align), valid={0: 5.1, 30: 4.0})
    panel = drawn(align, cpt)["Cross entropy, from cpt on"]
    assert panel.get_ylim()[1] < 6 and panel.get_xlim()[0] > 2900


def test_compared_runs_share_axes_from_zero_and_are_told_apart_without_colour(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / f"lr_{number}", STEADY, valid={0: 6.0, 2000: 4.0 + number})
        for number in range(3)
    ]
    figure = figure_of(*runs, compare=True)
    held_out, training = figure.get_axes()
    assert [held_out.get_title("left"), training.get_title("left")] == [
        "Held-out cross entropy",
        "Training cross entropy (lines: mean of 6 points)",
    ]
    assert all(each.get_xdata()[0] == 0 for each in held_out.get_lines())
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        f"lr_{number}:  held-out {4 + number}.000, training 3.010" for number in range(3)
    ]
    full = [each for each in training.get_lines() if each.get_linewidth() > 1]
    looks = [
        {(str(each._dash_pattern), each.get_marker()) for each in lines}  # type: ignore[attr-defined]
        for lines in (full, legend.get_lines())
    ]
    assert len(looks[0]) == 3 and len(looks[1]) == 3


def test_noisy_curves_have_a_mean_which_the_label_says(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [5.0 + (-1) ** number for number in range(200)])
    (panel,) = drawn(run).values()
    _, mean = line(panel, "training, mean of 6 points")
    assert all(abs(value - 5.0) < 0.5 for value in mean[5:-5])
    faint = [each for each in panel.get_lines() if each.get_alpha()]
    assert len(faint) == 1 and max(faint[0].get_ydata()) == 6.0
    (panel,) = drawn(run, options=Options(smooth=1)).values()
    assert "training" in labels(panel)


def test_what_is_no_number_is_a_gap_and_what_stands_alone_a_dot(tmp_path: Path) -> None:
    losses: list[float | None] = [*STEADY[:90], None, 4.0, None, *STEADY[93:]]
    (panel,) = drawn(write_run(tmp_path / "run", losses), options=Options(smooth=1)).values()
    _, values = line(panel, "training")
    assert [math.isnan(value) for value in values[89:94]] == [False, True, False, True, False]
    dots = [each for each in panel.get_lines() if each.get_linestyle() == "None"]
    assert [list(each.get_ydata()) for each in dots] == [[4.0]]


def test_a_steep_beginning_does_not_hide_the_rest_and_is_said(tmp_path: Path) -> None:
    losses = [12.0, 8.0, 5.0, *(3.0 - 0.001 * number for number in range(197))]
    (panel,) = drawn(write_run(tmp_path / "run", losses, valid={})).values()
    assert panel.get_ylim()[1] < 3.5
    assert "begins above the axis, at 12" in texts(panel)
    (panel,) = drawn(write_run(tmp_path / "flat", STEADY, valid={})).values()
    assert not texts(panel)


def test_continuations_are_marked_with_what_has_changed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", STEADY, resumed={500: {"optimizer.lr": [1e-3, 1e-4]}, 1500: {}})
    (panel,) = drawn(run).values()
    assert {"lr 1e-3 → 1e-4", "resumed"} <= set(texts(panel))
    marks = [each.get_xdata()[0] for each in panel.get_lines() if set(each.get_ydata()) == {0, 1}]
    assert marks == [50_000, 150_000]


def test_labels_of_continuations_do_not_run_into_each_other(tmp_path: Path) -> None:
    resumed = {iteration: {"optimizer.lr": [1e-3, 1e-4]} for iteration in range(100, 2000, 40)}
    run = write_run(tmp_path / "run", STEADY, resumed=resumed)
    figure = figure_of(run)
    (panel,) = figure.get_axes()
    boxes = [text.get_window_extent() for text in panel.texts if "→" in text.get_text()]
    assert len(boxes) >= 6
    assert not any(one.overlaps(other) for number, one in enumerate(boxes) for other in boxes[:number])


def test_few_layers_are_lines_and_many_are_colours(tmp_path: Path) -> None:
    def errors(number: int) -> dict[str, float]:
        return {
            "align/error": 0.5,
            **{f"align/error/layer_{2 * layer}": 0.1 + layer for layer in range(number)},
        }

    few = drawn(write_run(tmp_path / "few", stage="align", metrics=errors(3)))["Alignment error per layer"]
    assert labels(few) == ["layer 0", "layer 2", "layer 4"] and few.get_ylabel() == "relative squared error"
    title = "Alignment error per layer: relative squared error"
    many = drawn(write_run(tmp_path / "many", stage="align", metrics=errors(64)))[title]
    assert many.get_ylabel() == "layer" and len(many.collections) == 1
    shown = [text.get_text() for text in many.get_yticklabels()]
    assert len(shown) <= 10 and shown[:2] == ["0", "14"]


def test_layers_without_an_error_do_not_hide_how_the_others_differ(tmp_path: Path) -> None:
    errors = {f"align/error/layer_{layer}": [0.0, 1e-14, 0.02, 0.3][layer % 4] for layer in range(8)}
    title = "Alignment error per layer: relative squared error"
    panel = drawn(write_run(tmp_path / "run", stage="align", metrics=errors))[title]
    (mesh,) = panel.collections
    assert (mesh.norm.vmin, mesh.norm.vmax) == pytest.approx((3e-4, 0.3))
    lightness = [sum(mesh.to_rgba(value)[:3]) for value in mesh.get_array()[:4, 0]]
    assert lightness[0] == lightness[1] < lightness[2] < lightness[3]
    (bar,) = panel.child_axes
    assert texts(bar) == ["≤ 3e-4", "0.3"]


def test_stages_with_other_layers_share_one_picture_of_them(tmp_path: Path) -> None:
    def errors(layers: range) -> dict[str, float]:
        return {f"align/error/layer_{layer}": 0.1 + layer for layer in layers}

    one = write_run(tmp_path / "one", stage="align", metrics=errors(range(0, 12, 2)))
    load = checkpoint_of(one)
    other = write_run(tmp_path / "other", stage="align", metrics=errors(range(6, 14)), load=load)
    panel = drawn(one, other)["Alignment error per layer: relative squared error"]
    (mesh,) = panel.collections
    table = mesh.get_array()
    assert table.shape == (11, 6)  # layers 0, 2, 4 and 6 to 13; three reports of each run
    assert [bool(cell) for cell in table.mask[:, 0]] == [False] * 4 + [
        True,
        False,
        True,
        False,
        True,
        True,
        True,
    ]


def test_compared_layers_are_their_last_values(tmp_path: Path) -> None:
    metrics = {f"align/error/layer_{layer}": (0.9, 0.8, 0.1 * layer) for layer in range(3)}
    runs = [write_run(tmp_path / name, stage="align", metrics=metrics) for name in "ab"]
    panel = drawn(*runs, compare=True)["Alignment error per layer, at the end"]
    assert panel.get_xlabel() == "layer" and len(panel.get_lines()) == 2
    assert list(panel.get_lines()[0].get_ydata()) == pytest.approx([0.0, 0.1, 0.2])


def test_experts_show_range_table_and_what_is_dropped(tmp_path: Path) -> None:
    metrics = {
        "moe/aux_loss": 1.1,
        "moe/dropped_tokens": 0.05,
        "moe/idle_experts": 0.0,
        "moe/load_max_over_mean/layer_1": 1.5,
        "moe/load_max_over_mean/layer_3": 2.5,
        "moe/expert_load": [[1.5, 0.5], [0.25, 2.5]],
    }
    panels = drawn(write_run(tmp_path / "run", metrics=metrics))
    assert set(labels(panels["Expert load"])) == {
        "busiest expert",
        "mean of the layers' busiest",
        "least busy expert",
    }
    band = panels["Expert load"]
    assert line(band, "busiest expert")[1] == [2.5] * 3
    assert line(band, "least busy expert")[1] == [0.25] * 3
    table = panels["Load of each expert at the end (1 is an even spread)"]
    assert [text.get_text() for text in table.get_yticklabels()] == ["1", "3"]
    assert texts(table) == ["1.50", "0.50", "0.25", "2.50"] and table.get_xlabel() == "expert"
    assert list(panels["Dropped by full experts"].get_lines()[0].get_ydata()) == pytest.approx([5.0] * 3)
    assert "Experts without a token" not in panels, "there were none"


def test_spikes_show_schedule_and_statistics_in_percent(tmp_path: Path) -> None:
    metrics = {"spiking/k": 2.0, "spiking/sparsity": 0.6, "spiking/share_up_to_7": 0.9}
    panels = drawn(write_run(tmp_path / "run", metrics=metrics))
    assert {"Spike scale k", "Empty spike slots", "Channels that count up to 7"} <= set(panels)
    assert list(panels["Empty spike slots"].get_lines()[0].get_ydata()) == [60.0] * 3


def test_spikes_of_layers_are_shown_over_time_and_at_the_end(tmp_path: Path) -> None:
    metrics = {f"spiking/mean_spikes/layer_{layer}": (3.0, 2.0, 1.0 + layer) for layer in range(8)}
    panels = drawn(write_run(tmp_path / "run", metrics=metrics))
    assert "Mean spikes of a channel per layer: spikes" in panels
    last = panels["Mean spikes of a channel per layer, at the end"]
    assert list(last.get_lines()[0].get_ydata()) == [1.0 + layer for layer in range(8)]


def test_a_loss_with_the_teachers_part_is_not_on_the_axis_of_the_cross_entropy(tmp_path: Path) -> None:
    metrics = {"train/cross_entropy": 5.0, "train/kl_divergence": 0.5}
    panels = drawn(write_run(tmp_path / "run", metrics=metrics))
    assert list(panels) == [
        "Cross entropy",
        "Training loss with all its terms",
        "KL divergence from the teacher",
    ]
    assert line(panels["Cross entropy"], "training")[1] == [5.0] * 3


def test_several_held_out_datasets_have_a_line_each(tmp_path: Path) -> None:
    metrics = {f"valid/cross_entropy/{name}": 4.0 for name in ("code", "wiki")}
    (panel,) = drawn(write_run(tmp_path / "run", metrics=metrics)).values()
    assert labels(panel) == ["training", "held-out", "held-out code", "held-out wiki"]


def test_every_axis_says_its_unit_and_no_text_is_cut_off(tmp_path: Path) -> None:
    metrics = {
        "train/kl_divergence": 0.5,
        "train/learning_rate": (0.0, 1e-5, 1e-4),
        "train/grad_norm": 1.0,
        "train/tokens_per_second": 123_456.0,
        "train/mfu": 0.4,
        "moe/dropped_tokens": 0.0,
        "spiking/k": 2.0,
    }
    name = "a_run_with_a_name_that_is_much_longer_than_any_line_of_a_picture_could_ever_be_" * 2
    figure = figure_of(write_run(tmp_path / name[:120], metrics=metrics), panels=["all"])
    width, height = figure.bbox.size
    for panel in figure.get_axes():
        assert panel.get_xlabel() and panel.get_ylabel(), panel.get_title("left")
        box = panel.get_tightbbox()
        assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height
    for text in figure.texts:
        assert text.get_window_extent().x1 <= width
    sizes = [label.get_fontsize() for panel in figure.get_axes() for label in panel.get_xticklabels()]
    assert min(sizes) >= 9.0  # points of a picture 8 inches wide: 12.5 pixels at 800


def test_logarithmic_axes_leave_out_those_with_a_zero(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metrics={"train/learning_rate": (0.0, 1e-5, 1e-4)})
    panels = drawn(run, panels=["loss", "optimizer"], options=Options(is_log=True))
    assert panels["Cross entropy"].get_yscale() == "log"
    assert panels["Learning rate"].get_yscale() == "linear"


# Which panels, which metrics


def test_panels_and_metrics_that_are_not_there_are_sentences_with_near_names(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metrics={"train/grad_norm": 1.0})
    for arguments, sentence in (
        ({"panels": ["los"]}, "there is no panel los; did you mean loss?"),
        ({"panels": ["experts"]}, "reported no load of experts; leave it out"),
        ({"metrics": ["train/gradnorm"]}, "did you mean train/grad_norm?"),
        ({"metrics": ["grad_norm"]}, "did you mean train/grad_norm?"),
        ({"metrics": ["xyz"]}, "choose one of train/cross_entropy, train/grad_norm"),
    ):
        with pytest.raises(ConfigurationError) as error:
            drawn(run, **arguments)
        assert sentence in str(error.value)


def test_any_metric_is_drawn_by_its_name(tmp_path: Path) -> None:
    metrics = {
        "mine/thing": 1.0,
        **{f"mine/each/layer_{n}": 1.0 for n in range(2)},
        "mine/table": [[1.0, 2.0]],
    }
    run = write_run(tmp_path / "run", metrics=metrics)
    panels = drawn(run, metrics=["mine/thing", "mine/each", "mine/table"])
    assert list(panels) == ["mine/thing", "mine/each per layer", "mine/table, at the end"]
    with pytest.raises(ConfigurationError, match="a table, which cannot be compared"):
        drawn(run, write_run(tmp_path / "other", metrics=metrics), compare=True, metrics=["mine/table"])


# The line to reach


def dense(tmp_path: Path, held_out: Any) -> DenseLine:
    result = tmp_path / "dense.json"
    result.write_text(json.dumps({"cross_entropy": 2.5, "seq_length": 32, "held_out": held_out}))
    return DenseLine.read(str(result))


def test_the_dense_line_is_drawn_on_the_same_held_out_text_only(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (panel,) = drawn(run, options=Options(dense=dense(tmp_path, TEXT))).values()
    assert "dense source 2.5" in labels(panel) and panel.get_ylim()[0] < 2.5
    lines = plot_runs([run], tmp_path / "loss.png", options=Options(dense=dense(tmp_path, OTHER_TEXT)))
    assert "is left out: it was measured on other held-out text" in lines[-1]
    assert (tmp_path / "loss.png").exists()


def test_a_number_alone_is_believed_unless_the_runs_themselves_differ(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", held_out=OTHER_TEXT)
    number = DenseLine.read("2.5")
    recordings = [Recording.read(one), Recording.read(other)]
    assert number.reason_against(recordings[:1]) is None
    assert "different held-out text" in str(number.reason_against(recordings))
    title = "Held-out cross entropy (of different windows: not comparable)"
    assert title in drawn(one, other, compare=True)


def test_what_is_no_dense_cross_entropy_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("{}")
    for text, sentence in (
        ("much", "neither a number of nats per token nor a file"),
        ("nan", "neither a number of nats per token nor a file"),
        (str(tmp_path / "empty.json"), "holds no cross entropy"),
    ):
        with pytest.raises((ConfigurationError, DataError), match=sentence):
            DenseLine.read(text)


# Files


def test_pictures_appear_whole_in_the_format_that_their_name_says(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    begins = {"png": b"\x89PNG\r\n\x1a\n", "svg": b"<?xml", "pdf": b"%PDF"}
    for suffix, begin in begins.items():
        plot_runs([run], tmp_path / "deep" / f"loss.{suffix}")
        assert (tmp_path / "deep" / f"loss.{suffix}").read_bytes().startswith(begin)
    assert len(list((tmp_path / "deep").iterdir())) == 3
    width, _ = struct.unpack(">II", (tmp_path / "deep" / "loss.png").read_bytes()[16:24])
    assert width >= 800


def test_another_ending_is_a_sentence_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"ends in none of \.png, \.svg, \.pdf"):
        plot_runs([tmp_path / "nowhere"], tmp_path / "loss.jpeg")


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(PlatformError, match="cannot be written"):
        plot_runs([run], run / "metrics.jsonl" / "loss.png")


def test_a_run_with_nothing_to_draw_is_a_sentence_and_writes_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [None], valid={})
    with pytest.raises(ConfigurationError, match="no finite loss or held-out cross entropy yet"):
        plot_runs([run], tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_a_run_that_is_still_going_is_drawn_up_to_its_last_whole_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 40, "train/lo')
    (panel,) = drawn(run).values()
    assert line(panel, "training")[0][-1] == 3000


def test_a_single_point_is_seen(tmp_path: Path) -> None:
    (panel,) = drawn(write_run(tmp_path / "run", [5.0], valid={})).values()
    assert panel.get_lines()[0].get_marker() == "o" and panel.get_title("left") == "Training cross entropy"


def test_the_terminal_says_what_each_run_ended_at(tmp_path: Path) -> None:
    resumed = {20: {"optimizer.lr": [1e-3, 1e-4]}}
    one = write_run(tmp_path / "one", [5.0, None, 4.0], resumed=resumed)
    assert plot_runs([one], tmp_path / "loss.png") == [
        "one: cpt stage, 30 steps, 3k tokens, 3h 00m, held-out cross entropy 6.000 → 4.000, training 4.000, "
        "1 points without a number",
        "one, from iteration 20: lr 1e-3 → 1e-4",
    ]
    other = write_run(tmp_path / "other")
    assert plot_runs([one, other], tmp_path / "loss.png", compare=True)[:3] == [
        "run    steps  tokens    time  held-out  training",
        "one       30      3k  3h 00m    4.0000    4.0000",
        "other     30      3k  3h 00m    4.0000    4.0000",
    ]
