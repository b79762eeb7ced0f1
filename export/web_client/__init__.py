"""The client in JavaScript and the page, as data: `nsm.export.web` puts them into a bundle."""
