"""What is told to the kernel: XFRM, nftables, routes and addresses."""
