"""README as a person follows it: its code blocks, run on three machines that a real systemd has booted.

`python -m tests.readme FOLDER` boots a User-Mode Linux guest (`__main__`), whose systemd runs `walk`; the
gateways psg and nsg and the mobile node mn are systemd-nspawn machines in it (`machines`).
"""
