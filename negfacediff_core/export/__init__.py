"""A dataset in the formats that trainers read: bytes of images, records, tables and pages; no store."""
