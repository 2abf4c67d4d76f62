"""The Celery application: messages are doorbells, which carry a job's id and nothing else.

Whoever hears one claims the job that has waited longest; a bell for which no job waits does nothing. Messages are
acknowledged when they are heard: the record and its lease say what becomes of the job, so that Redis never delivers
a long one twice. A worker takes no bell that it cannot answer at once; other workers may.
"""

import logging
import ssl
import warnings
from typing import Any

from celery import Celery
from celery.platforms import SecurityWarning
from kombu.exceptions import OperationalError
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as broker
from redis import Connection, SSLConnection

from worker.connection import KEEPALIVE, UNREACHABLE, ServerState, StateParser, check_writes
from worker.jobs import Queue

log = logging.getLogger(__name__)

QUEUES: dict[Queue, str] = {"training": "flowpp-training", "inference": "flowpp-inference"}
"""Names of the queues in Redis."""

LONGEST_HEARING_SECONDS = 60
"""A bell that a worker took and did not acknowledge for so long, since it died, is delivered again."""


class _Connection(Connection):
    def __init__(self, **options: Any) -> None:
        super().__init__(parser_class=StateParser, **options)


class _TlsConnection(SSLConnection):
    def __init__(self, **options: Any) -> None:
        super().__init__(parser_class=StateParser, **options)


class _Channel(broker.Channel):
    connection_class: Any = _Connection
    connection_class_ssl: Any = _TlsConnection


class Transport(broker.Transport):
    """kombu's transport, which connects again if the server refuses commands for now.

    Otherwise kombu would raise most of these replies out of its loop, which ends the worker.
    """

    Channel = _Channel
    connection_errors = (*broker.Transport.connection_errors, ServerState)

    def establish_connection(self) -> Any:
        """Raises what a write does: else a worker of a server that only reads would connect again and again at once."""
        connection = super().establish_connection()
        try:
            check_writes(self._avail_channels[0].client)
        except UNREACHABLE:
            self.close_connection(connection)
            raise
        return connection


TRANSPORT_ALIASES.update(dict.fromkeys(("redis", "rediss"), f"{__name__}:{Transport.__name__}"))


def celery(redis_url: str) -> Celery:
    """The application on a Redis server. Tasks are called as their queue."""
    app = Celery("flowpp", broker=redis_url, set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        result_serializer="json",
        event_serializer="json",
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_create_missing_queues=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=5,
        broker_transport_options={
            "visibility_timeout": LONGEST_HEARING_SECONDS,
            **KEEPALIVE,
            "socket_timeout": 30,
            "health_check_interval": 10,
            # kombu's own names, as far as it lets us choose (its global_keyprefix misses commands that it uses)
            "unacked_key": "flowpp:unacked",
            "unacked_index_key": "flowpp:unacked:index",
            "unacked_mutex_key": "flowpp:unacked:mutex",
        },
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_enable_remote_control=True,
    )
    if redis_url.startswith("rediss://"):
        app.conf.broker_use_ssl = {"ssl_cert_reqs": ssl.CERT_REQUIRED}
    return app


def listener(app: Celery, queue: Queue, name: str) -> Any:
    """The Celery worker, called `name`, that receives the messages of a queue one by one."""
    with warnings.catch_warnings():
        # It warns of root, as a pickled message could run any code; our messages are JSON.
        warnings.simplefilter("ignore", SecurityWarning)
        return app.Worker(
            hostname=name,
            queues=[QUEUES[queue]],
            pool="threads",
            concurrency=1,
            quiet=True,
            without_mingle=True,  # with the next one: Redis workers that reconnect stop consuming (celery #8030)
            without_gossip=True,
            without_heartbeat=True,  # nobody listens, and where Redis is away it cannot be stopped
        )


class Doorbells:
    """Rings for the workers of a queue."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    def ring(self, queue: Queue, job_id: str) -> None:
        """Wakes a worker. A bell that cannot be rung now is rung by the reaper: the job's record is there already."""
        try:
            self._app.send_task(queue, args=[job_id], queue=QUEUES[queue], ignore_result=True, retry=False)
        except (OperationalError, *UNREACHABLE) as error:
            log.warning("the bell for job %s was not rung: %s", job_id, error)
