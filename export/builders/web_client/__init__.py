"""The client in JavaScript and the page, as data: `nsm.export.builders.web` puts them into a bundle."""
