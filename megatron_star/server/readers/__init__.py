"""Programs that make text of a document: each reads it from stdin, in a process of its own with limits.

They are run as files, and import nothing of this package: a process starts in a tenth of a second then.
"""
