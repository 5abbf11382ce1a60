from tests.broker import broker, make_broker

__all__ = ["broker", "make_broker"]
