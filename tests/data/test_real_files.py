"""The report on files that nobody here made: `python -m experiments.real_files`."""

import json

from media_samples import picture, steady, write_video
from PIL import Image

from experiments import real_files


def test_every_file_is_in_the_table_and_what_cannot_be_read_in_the_quarantine(tmp_path, capsys):
    media, results = tmp_path / "media", tmp_path / "results"
    (media / "one").mkdir(parents=True)
    whole = write_video(media / "one" / "whole.mp4", steady(4)).read_bytes()
    (media / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (media / "types.d.ts").write_text("export default never;\n")
    write_video(media / "uneven.mkv", [0, 0.1, 0.2, 0.9, 1.5])
    (media / "notes.txt").write_text("no video")
    frames = [Image.fromarray(picture() + i) for i in range(3)]
    frames[0].save(media / "still.gif")
    frames[0].save(media / "moves.gif", save_all=True, append_images=frames[1:], duration=400)
    (media / "broken.webp").write_bytes(b"RIFF")
    flags = (f"--media={media}", f"--out={tmp_path / 'out'}", f"--results={results}")
    assert real_files.main(flags) == 0
    assert "3 videos, 3 records left out" in capsys.readouterr().out
    rows = (results / "files.md").read_text().splitlines()[2:]
    rows = {row.split("`")[1]: row for row in rows}
    assert set(rows) == {
        "broken.webp", "cut.mp4", "moves.gif", "one/whole.mp4", "types.d.ts", "uneven.mkv",
    }  # fmt: skip
    assert "h264, 64 x 48 | 32, 4.000, 8 | 32, 4.000, 8 | 125 to 125 | 8 |" in rows["one/whole.mp4"]
    assert "| 100 to 700 |" in rows["uneven.mkv"] and "| 3, 1.200, 2.5 |" in rows["moves.gif"]
    left_out = [json.loads(line) for line in (results / "quarantine.jsonl").open()]
    assert sorted(entry["record"] for entry in left_out) == ["line 1", "line 2", "line 6"]
    statistics = json.loads((results / "statistics.json").read_text())
    # A GIF states no duration, so there is no window of it.
    assert statistics["tasks"] == {"conversation": 3, "temporal": 2}
    assert statistics["windows"]["max"] == 2.0
