"""The ledger: jobs and images in SQL. It is the queue, and the only truth about what has happened.

A job is queued, running, succeeded, failed or canceled. A worker claims queued jobs in one transaction and holds a
lease, which it renews while it works. A job with an expired lease is queued again, up to ``MAX_ATTEMPTS`` times: its
worker has died. Whoever has lost its lease cannot write a result any more, so that no job ends twice.
"""

import contextlib
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from dalle_pytorch.errors import UserError, first_line

QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELED = "queued", "running", "succeeded", "failed", "canceled"
DONE = (SUCCEEDED, FAILED, CANCELED)
MAX_ATTEMPTS = 3
"""Workers that a job may kill before it fails."""
DIED = f"the worker died {MAX_ATTEMPTS} times while it drew this job: too little memory, or a defect"
ADOPTED = "adopted"
"""Batch of jobs that were written from the notes of their images."""
ANY_OWNER = object()
"""Any owner."""
Row: TypeAlias = dict[str, Any]

METADATA = sa.MetaData()
JOBS = sa.Table(
    "jobs", METADATA,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),  # order of arrival
    sa.Column("id", sa.String(32), nullable=False, unique=True),
    sa.Column("owner", sa.String(100), nullable=False),
    sa.Column("person", sa.String(100), nullable=False, default=""),  # who takes turns with whom
    sa.Column("turn", sa.Integer, nullable=False, default=0),
    sa.Column("kind", sa.String(20), nullable=False),
    sa.Column("parameters", sa.JSON, nullable=False),
    sa.Column("batch", sa.String(200), nullable=False),  # jobs of one batch may be drawn together
    sa.Column("count", sa.Integer, nullable=False),
    sa.Column("state", sa.String(10), nullable=False, default=QUEUED),
    sa.Column("priority", sa.Integer, nullable=False, default=0),
    sa.Column("attempts", sa.Integer, nullable=False, default=0),
    sa.Column("worker", sa.String(40)),
    sa.Column("lease", sa.Float),
    sa.Column("progress", sa.Float, nullable=False, default=0.0),
    sa.Column("preview", sa.LargeBinary),
    sa.Column("watched", sa.Boolean, nullable=False, default=False),  # somebody wants previews
    sa.Column("cancel", sa.Boolean, nullable=False, default=False),
    sa.Column("error", sa.Text),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("started", sa.Float),
    sa.Column("finished", sa.Float),
    sa.Column("idempotency", sa.String(200)),
    sa.Column("request", sa.String(64)),
    sa.Index("by_state", "state", "priority", "turn", "number"),
    sa.Index("by_person", "person", "created"),
    sa.UniqueConstraint("owner", "idempotency"),
)  # fmt: skip
IMAGES = sa.Table(
    "images", METADATA,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(32), nullable=False, unique=True),
    sa.Column("job", sa.String(32), sa.ForeignKey("jobs.id"), nullable=False, index=True),
    sa.Column("owner", sa.String(100), nullable=False),
    sa.Column("place", sa.Integer, nullable=False),
    sa.Column("prompt", sa.Text, nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("index", sa.Integer, nullable=False),
    sa.Column("score", sa.Float),
    sa.Column("model", sa.String(64), nullable=False),
    sa.Column("parameters", sa.JSON, nullable=False),
    sa.Column("created", sa.Float, nullable=False),
)  # fmt: skip
FEATURES = sa.Table(
    "features", METADATA,
    sa.Column("image", sa.String(32), primary_key=True),
    sa.Column("clip", sa.String(64), primary_key=True),  # hash of the weights
    sa.Column("values", sa.LargeBinary, nullable=False),  # half precision; empty = the image cannot be read
)  # fmt: skip
SETTINGS = sa.Table(
    "settings",
    METADATA,
    sa.Column("name", sa.String(40), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
HOUR = 3600.0
MEASURED = 500
"""Jobs, the latest, of which the speed is measured."""
LOCK = 7421
"""Number of the lock that guards the queue's limits in PostgreSQL."""
SHOWN = [column for column in JOBS.c if column.name != "preview"]
WITH_TIMES = sa.select(
    IMAGES, JOBS.c.started, JOBS.c.finished, JOBS.c.created.label("asked"), JOBS.c.number.label("job_number")
).join(JOBS, JOBS.c.id == IMAGES.c.job)
"""Images, and when their job was drawn."""
NEWEST = (JOBS.c.created.desc(), JOBS.c.number.desc(), IMAGES.c.place, IMAGES.c.number)
"""The library: the newest job first, of a job the best image first."""
ORDER = (JOBS.c.priority.desc(), JOBS.c.turn, JOBS.c.number)
"""The queue: the highest priority first, people by turns, and each one's jobs as they came."""


class Cursor(NamedTuple):
    """A place in the library, which stays when images are deleted."""

    created: float
    job: int
    place: int
    number: int

    @classmethod
    def of(cls, row: Row) -> "Cursor":
        """The place of an image that ``Ledger.images`` gave."""
        return cls(row["asked"], row["job_number"], row["place"], row["number"])


class Job(NamedTuple):
    """A row of the ledger."""

    id: str
    owner: str
    person: str
    """Who asked, where one owner stands for all."""
    kind: str
    parameters: dict[str, Any]
    count: int
    """Images that it asks for."""
    state: str
    priority: int
    attempts: int
    progress: float
    """Share that is done, in [0, 1]."""
    error: str | None
    created: float
    started: float | None
    finished: float | None


class Ahead(NamedTuple):
    """What is drawn or waits before a queued job."""

    jobs: int
    images: int


class NewJob(NamedTuple):
    """What is to be queued."""

    parameters: dict[str, Any]
    """All that is needed to draw it."""
    count: int
    """Images that it asks for."""
    batch: str
    """Jobs with the same text may be drawn together."""
    priority: int = 0
    """Higher ones come first."""


class Limits(NamedTuple):
    """What may wait, and be asked for."""

    queued: int
    """Jobs that may wait."""
    owned: int
    """Jobs of one person that may wait."""
    hourly: int | None = None
    """Images that a person may ask for within an hour; None = any number."""


class Usage(NamedTuple):
    """What a person has of the limits."""

    waiting: int
    """Jobs."""
    hour: int
    """Images asked for within the last hour."""


class Beat(NamedTuple):
    """What a worker learns when it renews its leases."""

    lost: set[str]
    """Jobs to give up: canceled, or no longer held."""
    watched: set[str]
    """Jobs whose previews somebody wants."""


class NewImage(NamedTuple):
    """An image to be noted; its file is already there."""

    id: str
    place: int
    """Its rank, from 0 on."""
    prompt: str
    seed: int
    index: int
    score: float | None
    model: str
    parameters: dict[str, Any]


class QueueFull(Exception):
    """No more jobs are taken at the moment.

    Args:
        message: why.
        retry_after: seconds until it is worth to ask again.
    """

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Conflict(Exception):
    """An idempotency key was used for another request."""


class Ledger:
    """Jobs and images in a database.

    Args:
        url: of SQLAlchemy, as ``sqlite:///library/ledger.sqlite`` or ``postgresql+psycopg://...``.
        lease: seconds that a worker holds a job without a word.

    Raises:
        UserError: the database cannot be opened.
    """

    def __init__(self, url: str, *, lease: float = 15.0) -> None:
        self.lease, self.sqlite = lease, url.startswith("sqlite")
        try:
            self.engine = sa.create_engine(url, **({"connect_args": {"timeout": 30}} if self.sqlite else {}))
            if self.sqlite:
                sa.event.listen(self.engine, "connect", _prepare_sqlite)
            with self.write(alone=True) as connection:
                METADATA.create_all(connection)
                found = sa.inspect(connection)
                missing = [
                    c for t in METADATA.sorted_tables for c in t.c if not _is_among(c, found.get_columns(t.name))
                ]
        except (sa.exc.SQLAlchemyError, ImportError) as error:
            raise UserError(f"database={_without_password(url)} cannot be opened: {first_line(error)}") from error

        if missing:
            self.close()
            raise UserError(
                f"database={_without_password(url)} is of another version: it has no {missing[0]}. Move it away, and "
                "let serve.py repair=true write a new one from the images"
            )

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    @contextlib.contextmanager
    def write(self, *, alone: bool = False) -> Iterator[Connection]:
        """A transaction; ``alone`` with none of its kind beside it, which on SQLite all are."""
        with self.engine.begin() as connection:
            if self.sqlite:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            elif alone:
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")
            yield connection

    @property
    def now(self) -> Any:
        """The time that leases are measured by: the database's own where several machines reach it."""
        return sa.literal(time.time()) if self.sqlite else sa.extract("epoch", sa.func.clock_timestamp())

    def read(self, query: Any) -> list[Row]:
        """Rows of a query, which waits for no writer."""
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    # ---- asking for jobs

    def add(
        self, owner: str, requests: Sequence[NewJob], limits: Limits, *, person: str = "", key: str | None = None,
        digest: str = "",
    ) -> list[Job]:  # fmt: skip
        """Queue jobs, all of them or none; or give those that the same key of the same owner has made.

        Args:
            owner: whose jobs they are.
            requests: what is asked for.
            limits: what may wait.
            person: who takes turns with others.
            key: a client's own, so that asking again makes no second job; for one request.
            digest: what the client has sent, or a hash of it, to be compared where a key comes again.

        Raises:
            QueueFull: there is no room, or the owner has asked for too much.
            Conflict: the key belongs to another request.
        """
        with self.write(alone=True) as connection:
            if key is not None and (found := self._of_key(connection, owner, key, digest)) is not None:
                return [found]
            self._check(connection, person, len(requests), sum(request.count for request in requests), limits)
            ids, turns = [], dict[int, int]()
            for request in requests:
                last = turns.get(request.priority)
                turns[request.priority] = self._turn(connection, person, request.priority) if last is None else last + 1
                row = {
                    **request._asdict(), "id": uuid.uuid4().hex, "owner": owner, "person": person, "kind": "draw",
                    "turn": turns[request.priority], "idempotency": key, "request": digest,
                    "created": time.time(), "state": QUEUED, "attempts": 0, "progress": 0.0, "cancel": False,
                }  # fmt: skip
                connection.execute(sa.insert(JOBS).values(row))
                ids.append(row["id"])
        rows = {row["id"]: row for row in self.read(sa.select(*SHOWN).where(JOBS.c.id.in_(ids)))}
        return [_job(rows[name]) for name in ids]

    def of_key(self, owner: str, key: str, digest: str) -> Job | None:
        """The job that a key of an owner has made.

        Raises:
            Conflict: the key belongs to another request.
        """
        with self.engine.connect() as connection:
            return self._of_key(connection, owner, key, digest)

    def _of_key(self, connection: Connection, owner: str, key: str, digest: str) -> Job | None:
        same = (JOBS.c.owner == owner) & (JOBS.c.idempotency == key)
        found = connection.execute(sa.select(*SHOWN).where(same)).mappings().first()
        if found is not None and found["request"] != digest:
            raise Conflict
        return None if found is None else _job(found)

    def _turn(self, connection: Connection, person: str, priority: int) -> int:
        """The turn of a person's next job: behind their others, and with the next one of everybody else."""
        rank = JOBS.c.priority == priority

        def value(what: Any, *where: Any) -> int | None:
            return connection.execute(sa.select(what).where(rank, *where)).scalar()

        now = value(sa.func.min(JOBS.c.turn), JOBS.c.state == QUEUED, JOBS.c.attempts == 0)  # not what comes back
        if now is None:
            now = value(sa.func.max(JOBS.c.turn), JOBS.c.state == RUNNING)
        last = value(sa.func.max(JOBS.c.turn), JOBS.c.state == QUEUED, JOBS.c.person == person)
        return max(now or 0, 0 if last is None else last + 1)

    def _check(
        self, connection: Connection, person: str, jobs: int, images: int, limits: Limits, but: str = ""
    ) -> None:
        waiting = sa.select(JOBS.c.person, sa.func.count().label("waiting")).where(JOBS.c.state == QUEUED)
        counts = {row.person: row.waiting for row in connection.execute(waiting.group_by(JOBS.c.person))}
        if sum(counts.values()) + jobs > limits.queued or counts.get(person, 0) + jobs > limits.owned:
            raise QueueFull("too many jobs are waiting", 10)
        if limits.hourly is not None:
            self._check_hour(connection, person, images, limits.hourly, but)

    def _check_hour(self, connection: Connection, person: str, count: int, most: int, but: str) -> None:
        """Refuse what goes beyond a person's images of an hour; canceled jobs count, since some were drawn."""
        lately = (JOBS.c.person == person) & (JOBS.c.created > time.time() - HOUR) & (JOBS.c.id != but)
        query = sa.select(sa.func.sum(JOBS.c.count), sa.func.min(JOBS.c.created)).where(lately)
        images, first = connection.execute(query).one()
        if (images or 0) + count > most:
            wait = 1 if first is None else int(first + HOUR - time.time()) + 1
            raise QueueFull(f"{images or 0} images in the last hour and {count} more, {most} at most", wait)

    def get(self, job: str, owner: object = ANY_OWNER) -> Job:
        """A job.

        Raises:
            KeyError: there is none of this id, or it is another owner's.
        """
        rows = self.read(sa.select(*SHOWN).where(JOBS.c.id == job)) if job.isalnum() else []
        if not rows or (owner is not ANY_OWNER and rows[0]["owner"] != owner):
            raise KeyError(job)
        return _job(rows[0])

    def jobs(
        self, owner: object = ANY_OWNER, *, states: Sequence[str] = (), limit: int = 50, before: str | None = None
    ) -> list[Job]:
        """The latest jobs, newest first, or those before the job ``before``."""
        query = sa.select(*SHOWN).order_by(JOBS.c.number.desc()).limit(limit)
        if before is not None:
            query = query.where(JOBS.c.number < sa.select(JOBS.c.number).where(JOBS.c.id == before).scalar_subquery())
        if owner is not ANY_OWNER:
            query = query.where(JOBS.c.owner == owner)
        if states:
            query = query.where(JOBS.c.state.in_(states))
        return [_job(row) for row in self.read(query)]

    def ahead(self, job: str) -> Ahead:
        """What is drawn or waits before a queued job."""
        me = sa.select(JOBS.c.priority, JOBS.c.turn, JOBS.c.number).where(JOBS.c.id == job).subquery()
        same, turn = JOBS.c.priority == me.c.priority, JOBS.c.turn == me.c.turn
        earlier = (JOBS.c.turn < me.c.turn) | (turn & (JOBS.c.number < me.c.number))
        counted = (JOBS.c.state == RUNNING) | (
            (JOBS.c.state == QUEUED) & ((JOBS.c.priority > me.c.priority) | (same & earlier))
        )
        columns = sa.func.count().label("jobs"), sa.func.coalesce(sa.func.sum(JOBS.c.count), 0).label("images")
        (row,) = self.read(sa.select(*columns).select_from(JOBS.join(me, counted)))
        return Ahead(row["jobs"], int(row["images"]))

    def queue(self, owner: object = ANY_OWNER, *, limit: int = 1000) -> list[Job]:
        """Jobs that run, then those that wait in the order in which they are drawn."""
        query = sa.select(*SHOWN).where(JOBS.c.state.in_((RUNNING, QUEUED)))
        if owner is not ANY_OWNER:
            query = query.where(JOBS.c.owner == owner)
        running_first = sa.case((JOBS.c.state == RUNNING, 0), else_=1)
        return [_job(row) for row in self.read(query.order_by(running_first, *ORDER).limit(limit))]

    def usage(self, person: str) -> Usage:
        """What a person has of the limits."""
        lately = JOBS.c.created > time.time() - HOUR
        waiting = sa.func.sum(sa.case((JOBS.c.state == QUEUED, 1), else_=0))
        hour = sa.func.sum(sa.case((lately, JOBS.c.count), else_=0))
        query = sa.select(waiting.label("waiting"), hour.label("hour")).where(JOBS.c.person == person)
        (row,) = self.read(query.where((JOBS.c.state == QUEUED) | lately))
        return Usage(int(row["waiting"] or 0), int(row["hour"] or 0))

    @property
    def paused(self) -> bool:
        """Whether no new job is begun."""
        return bool(self.read(sa.select(SETTINGS).where(SETTINGS.c.name == "paused")))

    def pause(self, paused: bool) -> None:
        """Begin no new job until further notice; what is drawn already ends."""
        with self.write(alone=True) as connection:
            connection.execute(sa.delete(SETTINGS).where(SETTINGS.c.name == "paused"))
            if paused:
                connection.execute(sa.insert(SETTINGS).values(name="paused", value="yes"))

    def retry(self, job: str, limits: Limits) -> None:
        """Queue a job again that has failed or was canceled; any other stays as it is.

        Raises:
            QueueFull: there is no room.
        """
        with self.write(alone=True) as connection:
            ended = (JOBS.c.id == job) & JOBS.c.state.in_((FAILED, CANCELED))
            found = connection.execute(sa.select(*SHOWN).where(ended)).mappings().first()
            if found is None:
                return
            self._check(connection, found["person"], 1, found["count"], limits, but=job)
            anew = {
                "state": QUEUED, "attempts": 0, "error": None, "started": None, "finished": None, "progress": 0.0,
                "cancel": False, "preview": None, "created": time.time(),
                "turn": self._turn(connection, found["person"], found["priority"]),
            }  # fmt: skip
            connection.execute(sa.update(JOBS).where(ended).values(anew))

    def counts(self) -> dict[str, int]:
        """How many jobs there are in each state."""
        rows = self.read(sa.select(JOBS.c.state, sa.func.count().label("count")).group_by(JOBS.c.state))
        return {row["state"]: row["count"] for row in rows}

    def seconds_an_image(self) -> float | None:
        """Measured over the last batches, whose jobs began at the same time; None before the first."""
        last = sa.select(sa.func.max(JOBS.c.number)).scalar_subquery()
        batches = (
            sa.select(
                sa.func.sum(JOBS.c.count).label("images"), JOBS.c.started, sa.func.max(JOBS.c.finished).label("end")
            )
            .where(JOBS.c.state == SUCCEEDED, JOBS.c.batch != ADOPTED, JOBS.c.number > last - MEASURED)
            .group_by(JOBS.c.started)
            .order_by(JOBS.c.started.desc())
            .limit(10)
        )
        rows = self.read(batches)
        images, seconds, until = sum(row["images"] for row in rows), 0.0, 0.0
        for row in reversed(rows):  # what workers draw side by side takes the time of one
            seconds += max(row["end"] - max(row["started"], until), 0.0)
            until = max(until, row["end"])
        return seconds / images if images else None

    def cancel(self, job: str) -> None:
        """Cancel a job: one that waits at once, one that runs as soon as its worker hears of it."""
        with self.write() as connection:
            mine = JOBS.c.id == job
            waits = JOBS.c.state == QUEUED  # one statement: a worker may give the job back at the same time
            values = {
                "state": sa.case((waits, CANCELED), else_=JOBS.c.state), "cancel": sa.case((waits, False), else_=True),
                "finished": sa.case((waits, time.time()), else_=JOBS.c.finished),
            }  # fmt: skip
            connection.execute(sa.update(JOBS).where(mine, JOBS.c.state.in_((QUEUED, RUNNING))).values(values))

    def progress(self, jobs: Collection[str]) -> dict[str, tuple[str, float]]:
        """State and progress of some jobs."""
        rows = self.read(sa.select(JOBS.c.id, JOBS.c.state, JOBS.c.progress).where(JOBS.c.id.in_(jobs)))
        return {row["id"]: (row["state"], row["progress"]) for row in rows}

    def want_preview(self, job: str) -> None:
        """Ask the worker of a job for previews."""
        if self.read(sa.select(JOBS.c.id).where(JOBS.c.id == job, ~JOBS.c.watched)):
            with self.write() as connection:
                connection.execute(sa.update(JOBS).where(JOBS.c.id == job).values(watched=True))

    def preview(self, job: str) -> bytes | None:
        """The last preview of a job, a PNG."""
        rows = self.read(sa.select(JOBS.c.preview).where(JOBS.c.id == job))
        return rows[0]["preview"] if rows else None

    # ---- work

    def claim(self, worker: str, most: int) -> list[Job]:
        """Take the next job, and behind it those of its batch, ``most`` images in all or one job.

        Args:
            worker: who takes them.
            most: images that are drawn together.
        """
        self.release_expired()
        if not self.read(sa.select(JOBS.c.id).where(JOBS.c.state == QUEUED).limit(1)):  # an idle worker writes nothing
            return []
        if self.paused:
            return []
        with self.write() as connection:
            first = (
                sa.select(JOBS.c.id, JOBS.c.batch, JOBS.c.count, JOBS.c.priority)
                .where(JOBS.c.state == QUEUED)
                .order_by(*ORDER)
            )
            locked = first.limit(1).with_for_update(skip_locked=True)
            head = connection.execute(locked).mappings().first()
            if head is None:
                return []
            room = max(most // head["count"], 1)
            same = (JOBS.c.batch == head["batch"]) & (JOBS.c.priority == head["priority"])
            alike = first.where(same).limit(room).with_for_update(skip_locked=True)
            ids = [row["id"] for row in connection.execute(alike).mappings()]
            taken = {"state": RUNNING, "worker": worker, "lease": self.now + self.lease, "started": time.time()}
            update = sa.update(JOBS).where(JOBS.c.id.in_(ids), JOBS.c.state == QUEUED)
            connection.execute(update.values(**taken, attempts=JOBS.c.attempts + 1, progress=0.0, preview=None))
            rows = connection.execute(sa.select(*SHOWN).where(JOBS.c.id.in_(ids)).order_by(*ORDER)).mappings().all()
        return [_job(row) for row in rows]

    def release_expired(self) -> None:
        """Queue the jobs of dead workers again, and fail those that have killed too many."""
        late = (JOBS.c.state == RUNNING) & (JOBS.c.lease < self.now)
        if not self.read(sa.select(JOBS.c.id).where(late).limit(1)):
            return
        with self.write() as connection:
            late = (JOBS.c.state == RUNNING) & (JOBS.c.lease < connection.execute(sa.select(self.now)).scalar())
            given_up = {"state": FAILED, "error": DIED, "finished": time.time(), "worker": None}
            connection.execute(sa.update(JOBS).where(late, JOBS.c.attempts >= MAX_ATTEMPTS).values(given_up))
            ended = {"state": CANCELED, "finished": time.time(), "worker": None}
            connection.execute(sa.update(JOBS).where(late, JOBS.c.cancel).values(ended))
            connection.execute(sa.update(JOBS).where(late).values(state=QUEUED, worker=None))

    def beat(self, worker: str, jobs: Sequence[str]) -> Beat:
        """Renew the lease of jobs."""
        with self.write() as connection:
            held = JOBS.c.id.in_(jobs) & (JOBS.c.worker == worker) & (JOBS.c.state == RUNNING)
            connection.execute(sa.update(JOBS).where(held).values(lease=self.now + self.lease))
            kept = connection.execute(sa.select(JOBS.c.id, JOBS.c.watched).where(held, ~JOBS.c.cancel)).all()
        return Beat(set(jobs) - {row.id for row in kept}, {row.id for row in kept if row.watched})

    def note(self, worker: str, job: str, progress: float, preview: bytes | None = None) -> None:
        """Say how far a job is."""
        values: dict[str, Any] = (
            {"progress": progress} if preview is None else {"progress": progress, "preview": preview}
        )
        with self.write() as connection:
            held = (JOBS.c.id == job) & (JOBS.c.worker == worker) & (JOBS.c.state == RUNNING)
            connection.execute(sa.update(JOBS).where(held).values(values))

    def finish(self, worker: str, job: str, images: Sequence[NewImage]) -> bool:
        """A job and all its images at once; False if the worker does not hold it any more, or it was canceled."""
        now = time.time()
        with self.write() as connection:
            held = (JOBS.c.id == job) & (JOBS.c.worker == worker) & (JOBS.c.state == RUNNING) & ~JOBS.c.cancel
            done = {"state": SUCCEEDED, "progress": 1.0, "finished": now, "preview": None, "worker": None}
            if connection.execute(sa.update(JOBS).where(held).values(done)).rowcount == 0:
                return False
            owner = connection.execute(sa.select(JOBS.c.owner).where(JOBS.c.id == job)).scalar_one()
            rows = [{**image._asdict(), "job": job, "owner": owner, "created": now} for image in images]
            connection.execute(sa.insert(IMAGES), rows)
        return True

    def end(self, worker: str, jobs: Sequence[str], state: str, error: str | None = None) -> None:
        """End jobs without a result: failed, or canceled."""
        values = {"state": state, "error": error, "worker": None, "preview": None, "finished": time.time()}
        with self.write() as connection:
            held = JOBS.c.id.in_(jobs) & (JOBS.c.worker == worker) & (JOBS.c.state == RUNNING)
            connection.execute(sa.update(JOBS).where(held).values(values))

    def give_back(self, worker: str, jobs: Sequence[str], *, apart: bool = False) -> None:
        """Queue jobs again that a worker holds and is well enough to give back: this attempt does not count.

        Args:
            worker: who holds them.
            jobs: which.
            apart: each is to be drawn alone from now on: one of them has failed, and with it all.
        """
        values: dict[str, Any] = {"state": QUEUED, "worker": None, "preview": None, "started": None, "progress": 0.0}
        values |= {"attempts": JOBS.c.attempts - 1} | ({"batch": JOBS.c.id} if apart else {})
        with self.write() as connection:
            held = JOBS.c.id.in_(jobs) & (JOBS.c.worker == worker) & (JOBS.c.state == RUNNING)
            ended = {"state": CANCELED, "finished": time.time(), "worker": None, "preview": None}
            connection.execute(sa.update(JOBS).where(held, JOBS.c.cancel).values(ended))
            connection.execute(sa.update(JOBS).where(held).values(values))

    # ---- images

    def images(
        self,
        owner: object = ANY_OWNER,
        *,
        job: str | None = None,
        text: str = "",
        limit: int = 50,
        before: Cursor | None = None,
    ) -> list[Row]:
        """Rows of images, the newest job's first and within a job the best first.

        Args:
            owner: whose.
            job: of one job only.
            text: part of the prompt, capital letters or not.
            limit: at most so many.
            before: those that come after this place in that order.
        """
        query = WITH_TIMES.order_by(*NEWEST).limit(limit)
        if before is not None:
            here = (-JOBS.c.created, -JOBS.c.number, IMAGES.c.place, IMAGES.c.number)
            there = (-before.created, -before.job, before.place, before.number)
            query = query.where(sa.tuple_(*here) > sa.tuple_(*there))
        if owner is not ANY_OWNER:
            query = query.where(IMAGES.c.owner == owner)
        if job is not None:
            query = query.where(IMAGES.c.job == job)
        if text:
            query = query.where(IMAGES.c.prompt.icontains(text, autoescape=True))
        return self.read(query)

    def groups(self, owner: object = ANY_OWNER) -> Sequence[Any]:
        """Id, job, prompt, seed and the job's times of all images, the newest job's first; fast, for there are many."""
        columns = (
            IMAGES.c.id, IMAGES.c.job, IMAGES.c.prompt, IMAGES.c.seed, JOBS.c.started, JOBS.c.finished, JOBS.c.created
        )  # fmt: skip
        query = sa.select(*columns).join(JOBS, JOBS.c.id == IMAGES.c.job)
        if owner is not ANY_OWNER:
            query = query.where(IMAGES.c.owner == owner)
        with self.engine.connect() as connection:
            return connection.execute(query.order_by(*NEWEST)).all()

    def image(self, image: str, owner: object = ANY_OWNER) -> Row:
        """The row of an image.

        Raises:
            KeyError: there is none of this id, or it is another owner's.
        """
        rows = self.read(WITH_TIMES.where(IMAGES.c.id == image)) if image.isalnum() else []
        if not rows or (owner is not ANY_OWNER and rows[0]["owner"] != owner):
            raise KeyError(image)
        return rows[0]

    def images_of(self, ids: Sequence[str]) -> list[Row]:
        """The rows of some images, in any order."""
        return self.read(WITH_TIMES.where(IMAGES.c.id.in_(ids)))

    def forget(self, image: str) -> None:
        """Delete the row of an image."""
        with self.write() as connection:
            connection.execute(sa.delete(FEATURES).where(FEATURES.c.image == image))
            connection.execute(sa.delete(IMAGES).where(IMAGES.c.id == image))

    # ---- search by meaning

    def without_features(self, clip: str, owner: str, limit: int) -> list[str]:
        """The newest images of an owner that a CLIP has not looked at."""
        seen = sa.and_(FEATURES.c.image == IMAGES.c.id, FEATURES.c.clip == clip)
        query = sa.select(IMAGES.c.id).outerjoin(FEATURES, seen).where(IMAGES.c.owner == owner)
        query = query.where(FEATURES.c.image.is_(None)).order_by(IMAGES.c.number.desc()).limit(limit)
        return [row["id"] for row in self.read(query)]

    def add_features(self, clip: str, features: Mapping[str, bytes]) -> None:
        """Keep what a CLIP sees in images."""
        if not features:
            return
        with self.write(alone=True) as connection:  # of two servers the second finds them there
            there = sa.select(FEATURES.c.image).where(FEATURES.c.clip == clip, FEATURES.c.image.in_(list(features)))
            known = set(connection.execute(there).scalars())
            rows = [{"image": name, "clip": clip, "values": v} for name, v in features.items() if name not in known]
            if rows:
                connection.execute(sa.insert(FEATURES), rows)

    def features(self, clip: str, owner: str) -> dict[str, bytes]:
        """What a CLIP sees in each image of an owner."""
        query = sa.select(FEATURES.c.image, FEATURES.c["values"]).join(IMAGES, IMAGES.c.id == FEATURES.c.image)
        rows = self.read(query.where(FEATURES.c.clip == clip, IMAGES.c.owner == owner))
        return {row["image"]: row["values"] for row in rows if row["values"]}

    # ---- repair

    def image_ids(self, among: Sequence[str] | None = None) -> set[str]:
        """Ids of all images, or of those among some."""
        query = sa.select(IMAGES.c.id)
        return {row["id"] for row in self.read(query if among is None else query.where(IMAGES.c.id.in_(among)))}

    def state(self, job: str) -> str | None:
        """State of a job; None = there is none of this id."""
        rows = self.read(sa.select(JOBS.c.state).where(JOBS.c.id == job))
        return rows[0]["state"] if rows else None

    def is_adopted(self, job: str) -> bool:
        """Whether a job was written from the notes of its images."""
        return bool(self.read(sa.select(JOBS.c.id).where(JOBS.c.id == job, JOBS.c.batch == ADOPTED)))

    def adopt(self, job: str, owner: str, created: float, image: NewImage, *, seconds: float = 0.0) -> None:
        """Enter an image, and its job if that is lost as well, from the notes in its file.

        Args:
            job: its job's id.
            owner: whose it is.
            created: when, in seconds of Unix time.
            image: its row.
            seconds: how long the job took.
        """
        with self.write() as connection:
            if connection.execute(sa.select(JOBS.c.id).where(JOBS.c.id == job)).first() is None:
                row = {
                    "id": job, "owner": owner, "kind": "draw", "parameters": image.parameters, "batch": ADOPTED,
                    "count": len(image.parameters["indices"]), "state": SUCCEEDED, "progress": 1.0, "created": created,
                    "started": created - seconds, "finished": created,
                }  # fmt: skip
                connection.execute(sa.insert(JOBS).values(row))
            connection.execute(
                sa.insert(IMAGES).values({**image._asdict(), "job": job, "owner": owner, "created": created})
            )


def _is_among(column: sa.Column[Any], found: Sequence[Any]) -> bool:
    return any(each["name"] == column.name for each in found)


def _without_password(url: str) -> str:
    try:
        return sa.make_url(url).render_as_string(hide_password=True)
    except sa.exc.ArgumentError:
        return "(no URL of SQLAlchemy)"


def _job(row: Any) -> Job:
    return Job(**{name: row[name] for name in Job._fields})


def _prepare_sqlite(connection: Any, record: object) -> None:
    """Readers do not wait for the writer, and a commit is on disk."""
    connection.isolation_level = None  # or the driver would begin transactions by itself
    for pragma in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")
