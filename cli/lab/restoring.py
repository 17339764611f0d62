"""Shell scripts that put a host's network back into the state in which a scenario finds it."""

MADE = """
for kind in vti vti6 xfrm vrf; do
  ip -o link show type $kind | while read -r _ device _; do
    ip link del "${device%%[:@]*}"
  done
done
nft list tables | while read -r _ family name; do
  case "$name" in ikectx*) ;; *) nft delete table "$family" "$name" ;; esac
done
"""
"""Removes devices, with their routes, and tables of nftables that a scenario made; the agents' stay."""
FLUSH = """
for version in 4 6; do ip -$version addr flush scope global; ip -$version route flush table main; done
"""
KEEP_LINKS = """
ip -o addr show scope global | while read -r _ device _ address _; do
  case " $1 " in *" $address@$device "*) ;; *) ip addr del "$address" dev "$device" ;; esac
done
for version in 4 6; do
  for device in eth0 lan0 lo; do ip -$version route flush table main proto boot dev $device; done
  ip -$version route flush table main type unreachable
done
"""
"""Of gateways the addresses and the routes to each other stay, which their connections use: Linux 7.2 cuts
what is sent next over a route that was removed, even if it is there again, into segments of 36 octets."""
