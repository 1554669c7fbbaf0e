"""mosquitto with QoS 0: TCP carries it, and the members' own acknowledgements tell that it came."""

from __future__ import annotations

from peers import mqtt
from peers.mqtt import SERVER, serve

__all__ = ["SERVER", "Clients", "serve"]


class Clients(mqtt.Clients):
    qos = 0
