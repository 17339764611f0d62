"""`ikectx doctor`: what would keep this gateway from moving SAs."""
