"""What people said about completions: a store of its own, which no stage writes or removes.

Items (a prompt with its K responses) are stored whole, so labels keep their meaning whatever
becomes of the files that they came from. Rows are only ever added: what a labeler did last with an
item counts, be it to open it, to answer, or to take the answer back.
"""

import hashlib
import json
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sql
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from trl_instruct.console import get_logger, plural
from trl_instruct.errors import InputError

logger = get_logger(__name__)

RESERVED_FOR = 30 * 60.0  # seconds for which an open item is its labeler's
OPEN = ("open", "undo")
MOST_RESPONSES = 9
OPTIONAL = ("overall", "checks", "seconds", "flag", "note")  # of a label
METADATA = sql.MetaData()
# Content is JSON in ASCII: databases differ in what else text may hold.
ITEMS = sql.Table(
    "items",
    METADATA,
    sql.Column("position", sql.Integer, primary_key=True),
    sql.Column("item", sql.String(64), unique=True, nullable=False),
    sql.Column("split", sql.String(64), nullable=False),
    sql.Column("responses", sql.Integer, nullable=False),
    sql.Column("content", sql.Text, nullable=False),
)
ANSWERS = sql.Table(
    "answers",
    METADATA,
    sql.Column("number", sql.Integer, primary_key=True),
    sql.Column("id", sql.String(64), unique=True, nullable=False),  # the client's
    sql.Column("item", sql.ForeignKey(ITEMS.c.item), nullable=False),
    sql.Column("labeler", sql.String(64), nullable=False),
    sql.Column("action", sql.String(8), nullable=False),  # open, label, skip, undo
    sql.Column("content", sql.Text, nullable=False),
    sql.Column("time", sql.Float, nullable=False),  # seconds since 1970
)
# One row: `turns`, which every change updates first, so that changes wait for each other; `token`,
# with which the page is opened.
STATE = sql.Table(
    "state",
    METADATA,
    sql.Column("one", sql.Integer, primary_key=True),
    sql.Column("turns", sql.Integer, nullable=False),
    sql.Column("token", sql.String(64), nullable=False),
)
# What each labeler did last with each item, and the answers that stand.
_LAST = sql.select(sql.func.max(ANSWERS.c.number)).group_by(ANSWERS.c.item, ANSWERS.c.labeler)
LATEST = sql.select(ANSWERS).where(ANSWERS.c.number.in_(_LAST)).subquery("latest")
STANDING = sql.select(LATEST).where(LATEST.c.action.not_in(OPEN))


class Item(NamedTuple):
    """A prompt with its responses, and what else was in its record."""

    key: str
    split: str
    prompt: Any
    responses: list[Any]
    columns: dict[str, Any]

    @classmethod
    def of(cls, row: Any) -> "Item":
        """The item of a row of `ITEMS`."""
        columns = json.loads(row.content)
        return cls(row.item, row.split, columns.pop("prompt"), columns.pop("responses"), columns)


class Answer(NamedTuple):
    """What a labeler did with an item.

    The content of a "label": `ranks`, `overall` (1 to 7 or None) and `checks` (question -> yes or
    no), one per response; of any: `seconds`, `flag`, `note`.
    """

    item: Item
    labeler: str
    action: str
    content: dict[str, Any]


class LabelStore:
    """Items and answers in a database; InputError if it is none, or cannot be reached.

    The address is a file, which SQLite makes, or a server's, in SQLAlchemy's notation:
    `postgresql+psycopg://me@host/labels`. `token` opens the page, also after a restart.
    """

    def __init__(self, address: str | Path):
        self.address = str(address)
        try:
            if "://" not in self.address:
                path = Path(address).expanduser()
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch(mode=0o600)
                self.engine = sql.create_engine(f"sqlite:///{path}", connect_args={"timeout": 60})
            else:
                self.engine = sql.create_engine(self.address, pool_pre_ping=True)
            if self.engine.dialect.name == "sqlite":
                sql.event.listen(self.engine, "connect", _make_durable)
            for table in METADATA.sorted_tables:  # another process may do the same
                with suppress(IntegrityError), self.engine.begin() as connection:
                    connection.execute(sql.schema.CreateTable(table, if_not_exists=True))
            state = {"one": 1, "turns": 0, "token": secrets.token_urlsafe(24)}
            with suppress(IntegrityError), self.engine.begin() as connection:
                connection.execute(sql.insert(STATE).values(**state))
            with self.engine.connect() as connection:
                self.token: str = connection.execute(sql.select(STATE.c.token)).scalar_one()
        except (SQLAlchemyError, ImportError, OSError) as error:
            told = str(error).splitlines()[0]
            raise InputError(
                f"{self.address!r} cannot be used as a store of labels: {told}. Give a new file, "
                "the store of an earlier session, or a database's address in SQLAlchemy's notation."
            ) from error

    def add(self, records: Iterable[Mapping[str, Any]], split: str = "train") -> int:
        """Add items (2 to 9 different `responses`) that are not there; returns their number."""
        rows = {}
        for record in records:
            content = json.dumps(dict(record), sort_keys=True)
            key = hashlib.sha256(content.encode()).hexdigest()
            count = len(record["responses"])
            rows[key] = {"item": key, "split": split, "responses": count, "content": content}
        with self._turn() as connection:
            known = set(connection.execute(sql.select(ITEMS.c.item)).scalars())
            new = [row for key, row in rows.items() if key not in known]
            if new:
                connection.execute(sql.insert(ITEMS), new)
        return len(new)

    def items(self) -> list[Item]:
        """All items, in the order in which they were added."""
        with self.engine.connect() as connection:
            rows = connection.execute(sql.select(ITEMS).order_by(ITEMS.c.position))
            return [Item.of(row) for row in rows]

    def item(self, key: str) -> Item:
        """One item; InputError if there is none of that key."""
        with self.engine.connect() as connection:
            row = connection.execute(sql.select(ITEMS).where(ITEMS.c.item == key)).first()
        if row is None:
            raise InputError("The store holds no such item.")
        return Item.of(row)

    def next_item(self, labeler: str, labels_per_prompt: int = 1) -> Item | None:
        """The item that a labeler is to label, which is theirs for `RESERVED_FOR` seconds.

        Nobody gets an item that they have labelled or skipped, and at most `labels_per_prompt`
        labelers label an item or have it open. None if nothing is left.
        """
        latest = LATEST.c
        open_for = latest.action.in_(OPEN) & (latest.time > time.time() - RESERVED_FOR)
        taken = (latest.labeler != labeler) & ((latest.action == "label") | open_for)
        counted = sql.select(latest.item, sql.func.count().label("count")).where(taken)
        others = counted.group_by(latest.item).subquery()
        mine = sql.select(LATEST).where(latest.labeler == labeler).subquery()
        query = (
            sql.select(ITEMS)
            .outerjoin(others, others.c.item == ITEMS.c.item)
            .outerjoin(mine, mine.c.item == ITEMS.c.item)
            .where(ITEMS.c.responses > 1, sql.func.coalesce(mine.c.action, "open").in_(OPEN))
            .where(sql.func.coalesce(others.c.count, 0) < labels_per_prompt)
            .order_by(mine.c.item.is_(None), ITEMS.c.position)
        )
        with self._turn() as connection:
            row = connection.execute(query.limit(1)).first()
            if row is None:
                return None
            _write(connection, secrets.token_hex(16), row.item, labeler, "open", "{}")
        return Item.of(row)

    def save(
        self, answer_id: str, key: str, labeler: str, action: str, content: Mapping[str, Any]
    ) -> bool:
        """Store an answer, a "label" or "skip", to an item; it is on disk when this returns.

        The client makes the id: an answer that is sent again is stored once. Returns whether it
        counts: not if the labeler has answered that item in another window.
        """
        if action not in ("label", "skip"):
            raise InputError(f"The action is {action!r}; it must be 'label' or 'skip'.")
        item = self.item(key)
        if action == "label":
            check_label(content, len(item.responses))
        with self._turn() as connection:
            if _answer_of(connection, answer_id):
                return True
            own = STANDING.where(LATEST.c.labeler == labeler, LATEST.c.item == key)
            if connection.execute(own).first():
                return False
            _write(connection, answer_id, key, labeler, action, json.dumps(dict(content)))
        return True

    def undo(self, answer_id: str, labeler: str) -> Answer | None:
        """Take back a labeler's latest answer, whose item is open again; None if there is none."""
        own = STANDING.where(LATEST.c.labeler == labeler).order_by(LATEST.c.number.desc())
        with self._turn() as connection:
            found = _answer_of(connection, answer_id)
            if found is None and (found := connection.execute(own).first()):
                _write(connection, answer_id, found.item, labeler, "undo", found.content)
        if found is None:
            return None
        return Answer(self.item(found.item), labeler, found.action, json.loads(found.content))

    def answers(self) -> list[Answer]:
        """Answers that stand, by item and labeler."""
        standing = STANDING.subquery()
        given = standing.c.labeler, standing.c.action, standing.c.content.label("answer")
        query = sql.select(ITEMS, *given).join(standing, standing.c.item == ITEMS.c.item)
        with self.engine.connect() as connection:
            rows = connection.execute(query.order_by(ITEMS.c.position, standing.c.labeler)).all()
        return [Answer(Item.of(r), r.labeler, r.action, json.loads(r.answer)) for r in rows]

    def records(self, split: str = "train") -> list[dict[str, Any]]:
        """Labels of a split as rankings, one per labeler and item; InputError without any."""
        splits = [item.split for item in self.items()]
        if split not in splits:
            known = ", ".join(sorted(set(splits))) or "none"
            raise InputError(f"{self.address}: no split {split!r}; there are {known}.")
        labels = [a for a in self.answers() if a.action == "label" and a.item.split == split]
        prompts = plural(splits.count(split), "prompt")
        if not labels:
            told = f"{self.address}: none of {prompts} is labelled"
            raise InputError(f"{told}; `trl-instruct label` shows them.")
        found = []
        for item, labeler, _, content in labels:
            own = {"prompt": item.prompt, "responses": item.responses, "labeler": labeler}
            found.append({**item.columns, **content, **own})
        labelled = len({answer.item.key for answer in labels})
        by = plural(len({answer.labeler for answer in labels}), "labeler")
        logger.warning("%s: %d of %s labelled, by %s", self.address, labelled, prompts, by)
        names = {name: None for record in found for name in record}
        unused = [n for n in OPTIONAL if not any(record.get(n) for record in found)]
        return [{n: record.get(n) for n in names if n not in unused} for record in found]

    @contextmanager
    def _turn(self) -> Iterator[sql.Connection]:
        """A transaction that waits for all others which change something."""
        with self.engine.begin() as connection:
            connection.execute(sql.update(STATE).values(turns=STATE.c.turns + 1))
            yield connection


def check_label(content: Mapping[str, Any], count: int) -> None:
    """InputError unless a label has a whole rank >= 1, and at most one rating, per response."""
    ranks, overall = content.get("ranks"), content.get("overall")
    if not _is_list_of(ranks, range(1, count + 1), count):
        raise InputError(f"`ranks` must be {count} whole numbers from 1 to {count}: {ranks!r}.")
    if overall is not None and not _is_list_of(overall, [None, *range(1, 8)], count):
        raise InputError(f"`overall` must be {count} ratings from 1 to 7 or null: {overall!r}.")
    for question, given in (content.get("checks") or {}).items():
        if not _is_list_of(given, [True, False], count):
            raise InputError(f"`checks` must give {count} times yes or no to {question!r}.")


def _is_list_of(values: Any, known: Iterable[Any], count: int) -> bool:
    """Whether it is a list of `count` known values; True is not 1."""
    kinds = [(type(value), value) for value in known]
    return isinstance(values, list) and [(type(v), v) in kinds for v in values] == [True] * count


def _make_durable(connection: Any, _: Any) -> None:
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _answer_of(connection: sql.Connection, answer_id: str) -> Any:
    return connection.execute(sql.select(ANSWERS).where(ANSWERS.c.id == answer_id)).first()


def _write(connection: sql.Connection, answer_id: str, *values: str) -> None:
    row = dict(zip(("item", "labeler", "action", "content"), values, strict=True))
    connection.execute(sql.insert(ANSWERS).values(id=answer_id, time=time.time(), **row))
