"""The JavaScript client and its page, as data files that `nsm.export.builders.web` copies to a bundle."""
