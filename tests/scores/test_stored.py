from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headwise.attention.schema import ATTENTION, SCALARS
from headwise.scores.stored import BLOCK_ROWS, Heads, StoredExample, count_heads, stored_examples
from tests.synthetic import draw_scalars, highest, one_view, stored, write_part

LAYOUT = one_view(3, 4)
HEADS = Heads(2, 3)


def draw_maps(ids: Iterable[str], shape: tuple[int, ...] = (2, 3, 12)) -> dict[str, np.ndarray]:
    return {example_id: stored(np.random.default_rng(list(example_id.encode())).random(shape) + 0.01) for example_id in ids}


def ids(number: int) -> list[str]:
    return [f"e{i:04d}" for i in range(number)]


def read(parts: list[Path], heads: Heads = HEADS) -> list[StoredExample]:
    return list(stored_examples(parts, heads))


@pytest.mark.parametrize("row_group_size", [1, 4, 6, 7, 1000])
def test_maps_and_scalars_come_back_example_by_example(tmp_path: Path, row_group_size: int) -> None:
    maps = draw_maps(ids(9))
    part = write_part(tmp_path / "part.parquet", maps, LAYOUT, row_group_size=row_group_size)
    found = read([part])
    assert [example.example_id for example in found] == ids(9)
    for example in found:
        assert example.layout == LAYOUT
        np.testing.assert_array_equal(example.maps, maps[example.example_id].reshape(6, 12).astype(np.float64))
        np.testing.assert_array_equal(example.scalars, draw_scalars(example.example_id, (2, 3)).reshape(6, -1))
        assert example.highest is not None
        assert example.highest.tolist() == [highest(example.example_id, layer, head) for layer, head in np.ndindex(2, 3)]


def test_an_example_that_two_blocks_share_is_whole(tmp_path: Path) -> None:
    number = BLOCK_ROWS // HEADS.rows + 2
    maps = draw_maps(ids(number))
    part = write_part(tmp_path / "part.parquet", maps, LAYOUT, row_group_size=BLOCK_ROWS - 1)
    found = list(stored_examples([part], HEADS, maps_only=True))
    assert [example.example_id for example in found] == ids(number)
    assert all(np.array_equal(example.maps, maps[example.example_id].reshape(6, 12)) for example in found)
    assert found[0].layout is found[0].scalars is found[0].highest is None


@pytest.mark.parametrize("shares", [1, 2, 3, 5])
def test_the_order_does_not_depend_on_how_examples_were_shared_out(tmp_path: Path, shares: int) -> None:
    maps = draw_maps(ids(10))
    names = np.random.default_rng(shares).permutation(ids(10))
    parts = [
        write_part(tmp_path / f"{share}" / "part.parquet", {name: maps[name] for name in names[share::shares]}, LAYOUT)
        for share in range(shares)
    ]
    assert [example.example_id for example in read(parts)] == ids(10)


def test_an_example_of_two_shards_counts_once(tmp_path: Path) -> None:
    first = write_part(tmp_path / "0.parquet", draw_maps(ids(4)), LAYOUT)
    second = write_part(tmp_path / "1.parquet", draw_maps(ids(5)[3:]), LAYOUT)
    assert [example.example_id for example in read([first, second])] == ids(5)


def test_examples_may_have_layouts_of_their_own(tmp_path: Path) -> None:
    maps = draw_maps(["a", "c"]) | draw_maps(["b"], (2, 3, 4)) | {"d": np.zeros((2, 3, 0), dtype=np.float16)}
    part = write_part(tmp_path / "part.parquet", maps, {"a": LAYOUT, "b": one_view(2, 2), "c": one_view(4, 3), "d": ()})
    found = read([part])
    assert [example.layout for example in found] == [LAYOUT, one_view(2, 2), one_view(4, 3), None]
    for example in found:
        np.testing.assert_array_equal(example.maps, maps[example.example_id].reshape(6, -1))


def test_layers_and_heads_are_counted_past_an_empty_shard(tmp_path: Path) -> None:
    empty = tmp_path / "empty.parquet"
    pq.write_table(ATTENTION.empty_table(), empty)
    part = write_part(tmp_path / "part.parquet", draw_maps(ids(2)), LAYOUT)
    assert count_heads([empty, part]) == HEADS
    assert [example.example_id for example in read([empty, part])] == ids(2)
    with pytest.raises(ValueError, match="no attention is stored"):
        count_heads([empty])


def test_layers_and_heads_are_counted_over_all_row_groups_from_the_footer_alone(tmp_path: Path) -> None:
    part = write_part(tmp_path / "part.parquet", draw_maps(ids(2)), LAYOUT, row_group_size=2)
    content = part.read_bytes()
    start = pq.read_metadata(part).row_group(0).column(0).dictionary_page_offset
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    part.write_bytes(content[:start] + bytes(footer - start) + content[footer:])  # the pages are gone
    assert count_heads([part]) == HEADS


def test_a_file_without_statistics_is_refused(tmp_path: Path) -> None:
    part = write_part(tmp_path / "part.parquet", draw_maps(ids(2)), LAYOUT)
    pq.write_table(pq.read_table(part), part, write_statistics=False)
    with pytest.raises(ValueError, match=r"part\.parquet: no statistics of column 'layer'.*run the attention step again"):
        count_heads([part])


def broken(path: Path, table: pa.Table) -> Path:
    pq.write_table(table, path)
    return path


@pytest.fixture
def table(tmp_path: Path) -> pa.Table:
    return pq.read_table(write_part(tmp_path / "whole.parquet", draw_maps(ids(3)), LAYOUT))


def test_a_missing_last_row_is_named(tmp_path: Path, table: pa.Table) -> None:
    with pytest.raises(ValueError, match=r"'e0002' has 5 of its 6 rows \(2 layers x 3 heads\)"):
        read([broken(tmp_path / "part.parquet", table.slice(0, 17))])


def test_a_missing_inner_row_is_named(tmp_path: Path, table: pa.Table) -> None:
    with pytest.raises(ValueError, match="does not have one row per layer and head"):
        read([broken(tmp_path / "part.parquet", pa.concat_tables([table.slice(0, 7), table.slice(8, 10), table.slice(17)]))])


@pytest.mark.parametrize("order", [[1, 0, 2, 3, 4, 5], [3, 4, 5, 0, 1, 2]])
def test_heads_or_layers_in_another_order_are_refused(tmp_path: Path, table: pa.Table, order: list[int]) -> None:
    with pytest.raises(ValueError, match="'e0000' does not have one row per layer and head"):
        read([broken(tmp_path / "part.parquet", table.take(pa.array([*order, *range(6, 18)])))])


def test_unsorted_examples_are_refused(tmp_path: Path, table: pa.Table) -> None:
    with pytest.raises(ValueError, match="'e0000' comes after 'e0001'"):
        read([broken(tmp_path / "part.parquet", pa.concat_tables([table.slice(6, 6), table.slice(0, 6)]))])


def test_a_map_of_another_layout_is_refused(tmp_path: Path) -> None:
    part = write_part(tmp_path / "part.parquet", draw_maps(["a"]), one_view(3, 5))
    with pytest.raises(ValueError, match=r"part\.parquet: 'a' has maps of 12 visual tokens, its views have 15 cells \(3 x 5\)"):
        read([part])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_map_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    maps = draw_maps(ids(3))
    maps["e0001"][1, 2, 5] = value
    with pytest.raises(ValueError, match="'e0001' has a map that is not finite"):
        read([write_part(tmp_path / "part.parquet", maps, LAYOUT)])


def test_a_truncated_file_and_a_missing_column_are_refused(tmp_path: Path, table: pa.Table) -> None:
    torn = tmp_path / "torn.parquet"
    torn.write_bytes((tmp_path / "whole.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"torn\.parquet: not a readable Parquet file"):
        read([torn])
    with pytest.raises(ValueError, match=r"missing columns \['map'\]"):
        count_heads([broken(tmp_path / "part.parquet", table.drop_columns(["map"]))])


def test_memory_does_not_grow_with_the_examples(tmp_path: Path) -> None:
    def peak(number: int) -> int:
        heads, visual = Heads(8, 8), 256
        rows = number * heads.rows
        maps = np.random.default_rng(0).random((rows, visual)).astype(np.float16)  # 33 KB of maps per example
        layers, numbers = np.divmod(np.tile(np.arange(heads.rows), number), heads.num_heads)
        made = {
            "example_id": np.repeat(ids(number), heads.rows),
            "layer": layers,
            "head": numbers,
            "views": [[{"rows": 16, "columns": 16, "top": 0.0, "left": 0.0, "bottom": 1.0, "right": 1.0}]] * rows,
            **{name: np.zeros(rows, dtype=np.float32) for name in (*SCALARS, "map_max", "text_image_map_max")},
        }
        lists = pa.ListArray.from_arrays(np.arange(0, rows * visual + 1, visual, dtype=np.int32), pa.array(maps.reshape(-1)))
        columns = [lists if name.endswith("map") else pa.array(made[name], type=ATTENTION.field(name).type) for name in ATTENTION.names]
        part = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table(columns, names=ATTENTION.names).cast(ATTENTION), part, use_dictionary=False, row_group_size=rows)
        del columns, lists, maps
        before = pa.total_allocated_bytes()
        return max(pa.total_allocated_bytes() - before for _ in stored_examples([part], heads))

    small, large = peak(600), peak(2400)  # 20 MB and 79 MB of maps, each in one row group
    assert large < 1.6 * small  # the batch that is being decoded meanwhile counts by as much as there is of it
