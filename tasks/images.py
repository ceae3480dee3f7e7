"""Step 1: the images and questions of a run, with exact masks where the data has them. `python -m tasks.images`"""

from pathlib import Path

from headwise.data import DataSource, source_inputs, write_data
from headwise.examples import check_bad_share, read_examples, write_bad
from headwise.files import new_folder, write_manifest
from headwise.leakage import check_leaks, split_leaks
from tasks.command import plain_errors, read_settings
from tasks.progress import progress_bar


def run(source: DataSource, out: Path) -> None:
    """Write the data set. Raises ValueError if more than the stated share of the rows cannot be used, or one is calibrated by what it is
    judged by.
    """
    with new_folder(out) as folder, progress_bar("images") as progress:
        bad = write_data(source, folder, progress)
        examples = read_examples(folder)
        check_bad_share(bad, len(bad) + len(examples), source.max_bad_share)
        check_leaks(split_leaks(folder, examples, source.min_distance), "to judge by")
        write_bad(bad, folder)
        write_manifest(folder, stage="images", settings=source, inputs=source_inputs(source))


if __name__ == "__main__":
    with plain_errors():
        run(read_settings("images", DataSource), Path("data/images"))
