"""Kafka's wire protocol without a JVM: the mock cluster inside librdkafka, on loopback ports.

It speaks the real protocol, stores records, elects leaders and answers errors on demand. Python's
binding of librdkafka does not offer it, its library does.
"""

import ctypes
from typing import Any, Final

PRODUCE: Final = 0
"""Kafka's number of a request to store records."""

ERRORS: Final = {
    "MESSAGE_TOO_LARGE": 10,
    "NOT_ENOUGH_REPLICAS": 19,
    "TOPIC_AUTHORIZATION_FAILED": 29,
    "OUT_OF_ORDER_SEQUENCE_NUMBER": 45,
}
"""Kafka's numbers of answers."""


def _library() -> Any:
    from confluent_kafka import cimpl

    library = ctypes.CDLL(cimpl.__file__)  # symbols of librdkafka too, which it links
    pointer, number, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    for name, result, arguments in (
        ("rd_kafka_conf_new", pointer, ()),
        ("rd_kafka_conf_set", number, (pointer, text, text, text, ctypes.c_size_t)),
        ("rd_kafka_new", pointer, (number, pointer, text, ctypes.c_size_t)),
        ("rd_kafka_destroy", None, (pointer,)),
        ("rd_kafka_mock_cluster_new", pointer, (pointer, number)),
        ("rd_kafka_mock_cluster_destroy", None, (pointer,)),
        ("rd_kafka_mock_cluster_bootstraps", text, (pointer,)),
        ("rd_kafka_mock_topic_create", number, (pointer, text, number, number)),
        ("rd_kafka_mock_broker_set_down", number, (pointer, ctypes.c_int32)),
        ("rd_kafka_mock_broker_set_up", number, (pointer, ctypes.c_int32)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Cluster:
    """Three brokers; a topic is made with its first record.

    Attributes:
        brokers: ``host:port`` of each.
    """

    def __init__(self) -> None:
        self._library = library = _library()
        settings = library.rd_kafka_conf_new()
        library.rd_kafka_conf_set(settings, b"log_level", b"0", None, 0)
        problem = ctypes.create_string_buffer(512)
        self._owner = library.rd_kafka_new(0, settings, problem, len(problem))
        assert self._owner, problem.value
        self._cluster = library.rd_kafka_mock_cluster_new(self._owner, 3)
        told: bytes = library.rd_kafka_mock_cluster_bootstraps(self._cluster)
        self.brokers = tuple(told.decode().split(","))

    def answer(self, *errors: str) -> None:
        """Answer the next requests to store records with these errors, in this order."""
        push = self._library.rd_kafka_mock_push_request_errors
        push.restype = None
        numbers = [ctypes.c_int(ERRORS[error]) for error in errors]
        push(
            ctypes.c_void_p(self._cluster),
            ctypes.c_int16(PRODUCE),
            ctypes.c_size_t(len(numbers)),
            *numbers,
        )

    def down(self) -> None:
        """Every broker closes its connections and takes no new ones."""
        for number in (1, 2, 3):
            self._library.rd_kafka_mock_broker_set_down(self._cluster, number)

    def up(self) -> None:
        """They are back, with what they had stored."""
        for number in (1, 2, 3):
            self._library.rd_kafka_mock_broker_set_up(self._cluster, number)

    def records(self, topic: str, count: int) -> list[Any]:
        """So many records of a topic, read by librdkafka's own consumer; blocks."""
        from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition

        consumer = Consumer({"bootstrap.servers": ",".join(self.brokers), "group.id": "reader"})
        try:
            partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
            consumer.assign([TopicPartition(topic, n, OFFSET_BEGINNING) for n in partitions])
            return consumer.consume(count, timeout=10)
        finally:
            consumer.close()

    def close(self) -> None:
        """It is gone."""
        self._library.rd_kafka_mock_cluster_destroy(self._cluster)
        self._library.rd_kafka_destroy(self._owner)
