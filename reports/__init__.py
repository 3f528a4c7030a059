"""From saved measurements to tables, plots and one page. Reads files; imports none of the suite."""
