"""Make train, validation and test Parquet from a raw file of UCI's Census-Income (KDD).

    python pipelines/census_income/prepare.py RAW OUT

RAW is UCI's census-income.test or census-income.data, plain or as .gz; OUT gets train.parquet, val.parquet and
test.parquet. README.md in this folder tells where the data comes from, under what licence, and what each column is.
"""

import argparse
import gzip
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP = 65_536
MISSING_FILE = "RAW should be a file of UCI's Census-Income (KDD), plain or .gz. There is no {path}."

# The fields of a raw line in their order; the last one of a line is the income.
TEXT = pa.string()
FIELDS = {
    "age": pa.int16(),
    "class_of_worker": TEXT,
    "industry_code": pa.int8(),
    "occupation_code": pa.int8(),
    "education": TEXT,
    "wage_per_hour": pa.int32(),
    "enrolled_in_edu_last_wk": TEXT,
    "marital_stat": TEXT,
    "major_industry": TEXT,
    "major_occupation": TEXT,
    "race": TEXT,
    "hispanic_origin": TEXT,
    "sex": TEXT,
    "labor_union_member": TEXT,
    "reason_for_unemployment": TEXT,
    "full_or_part_time_stat": TEXT,
    "capital_gains": pa.int32(),
    "capital_losses": pa.int32(),
    "dividends_from_stocks": pa.int32(),
    "tax_filer_stat": TEXT,
    "region_prev_residence": TEXT,
    "state_prev_residence": TEXT,
    "household_family_stat": TEXT,
    "household_summary": TEXT,
    "instance_weight": pa.float32(),
    "migration_msa": TEXT,
    "migration_reg": TEXT,
    "migration_within_reg": TEXT,
    "live_in_this_house_1y_ago": TEXT,
    "migration_prev_in_sunbelt": TEXT,
    "num_persons_worked_for_employer": pa.int8(),
    "family_members_under_18": TEXT,
    "country_birth_father": TEXT,
    "country_birth_mother": TEXT,
    "country_birth_self": TEXT,
    "citizenship": TEXT,
    "own_business_or_self_employed": pa.int8(),
    "fill_inc_questionnaire_veterans": TEXT,
    "veterans_benefits": pa.int8(),
    "weeks_worked_in_year": pa.int8(),
    "year": pa.int8(),
}
LABELS = {
    "label_income_50k": pa.int8(),
    "label_never_married": pa.int8(),
    "label_bachelor_or_more": pa.int8(),
    "label_weeks_worked": pa.float32(),
    "label_worked": pa.int8(),
}
SCHEMA = pa.schema([*FIELDS.items(), *LABELS.items()])
INCOMES = {"- 50000.": 0, "50000+.": 1}
DEGREES = (
    "Bachelors degree(BA AB BS)",
    "Masters degree(MA MS MEng MEd MSW MBA)",
    "Prof school degree (MD DDS DVM LLB JD)",
    "Doctorate degree(PhD EdD)",
)


def read_lines(path: Path) -> Iterator[str]:
    """The file's lines without their ends; empty ones are passed over."""
    if not path.is_file():
        raise ValueError(MISSING_FILE.format(path=path))
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        for line in lines:
            if stripped := line.rstrip("\r\n"):
                yield stripped


def part_of(line: str) -> str:
    """Eight lines in ten are for training; equal lines land in the same part.

    >>> part_of("73, Not in universe")
    'train'
    """
    tenth = int(hashlib.sha256(line.encode()).hexdigest()[:8], 16) % 10
    return "train" if tenth < 8 else "val" if tenth == 8 else "test"


def parse(line: str, place: str) -> dict[str, Any]:
    """A raw line as a row of SCHEMA. Raises ValueError naming the place and the field."""
    texts = [text.strip() for text in line.split(",")]
    if len(texts) != len(FIELDS) + 1:
        raise ValueError(f"{place} should have {len(FIELDS) + 1} fields, separated by commas. Found {len(texts)}.")
    if texts[-1] not in INCOMES:
        raise ValueError(f"{place} should end with one of {', '.join(INCOMES)}. Found '{texts[-1]}'.")
    row: dict[str, Any] = {}
    for (name, kind), text in zip(FIELDS.items(), texts[:-1], strict=True):
        try:
            row[name] = text if kind == TEXT else float(text) if kind == pa.float32() else int(text)
        except ValueError:
            raise ValueError(f"`{name}` in {place} should be a number. Found '{text}'.") from None
    weeks = row["weeks_worked_in_year"]
    row["label_income_50k"] = INCOMES[texts[-1]]
    row["label_never_married"] = int(row["marital_stat"] == "Never married")
    row["label_bachelor_or_more"] = int(row["education"] in DEGREES)
    row["label_weeks_worked"] = float(weeks)
    row["label_worked"] = int(weeks > 0)
    return row


def prepare(raw: Path, out: Path) -> dict[str, int]:
    """Write the parts in the raw file's order; {part: rows}.

    Raises ValueError naming the line if the file is not UCI's.
    """
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "val": [], "test": []}
    for number, line in enumerate(read_lines(raw), start=1):
        rows[part_of(line)].append(parse(line, f"line {number} of {raw}"))
    out.mkdir(parents=True, exist_ok=True)
    for name, part in rows.items():
        table = pa.Table.from_pylist(part, SCHEMA)
        pq.write_table(table, out / f"{name}.parquet", row_group_size=ROW_GROUP, compression="zstd")
    return {name: len(part) for name, part in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("raw", type=Path, help="UCI's census-income.test or census-income.data, plain or .gz")
    parser.add_argument("out", type=Path, help="folder for train.parquet, val.parquet and test.parquet")
    arguments = parser.parse_args()
    try:
        counts = prepare(arguments.raw, arguments.out)
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    for name, rows in counts.items():
        print(f"{arguments.out / name}.parquet: {rows:,} rows")


if __name__ == "__main__":
    main()
