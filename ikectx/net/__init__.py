"""Sockets: links between gateways, and datagrams between a mobile node and a gateway."""
