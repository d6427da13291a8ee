"""Rendered faces: an endless, licence-clean, privacy-free source of identities from one morphable head."""
