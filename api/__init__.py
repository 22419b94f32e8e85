"""Everything that knows HTTP: routes, forms, answers, access, pages. Imports the pipeline and what lies below."""
