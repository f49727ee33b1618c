//! Titled tables with remarks: what every report for people is made of, and the forms that they are written in.

use std::io::{self, Write};

use comfy_table::{CellAlignment, ContentArrangement, LineStyle, Table, presets};

/// A titled table with remarks below it.
pub(crate) struct Section {
    pub(crate) title: String,
    pub(crate) rows: Option<Rows>,
    pub(crate) lines: Vec<String>,
}

impl Section {
    /// A section without a table.
    pub(crate) fn of_lines(title: &str, lines: Vec<String>) -> Self {
        Self {
            title: title.to_owned(),
            rows: None,
            lines,
        }
    }
}

/// A table.
pub(crate) struct Rows {
    pub(crate) head: Vec<String>,
    pub(crate) body: Vec<Vec<String>>,
    /// Which columns are text, and stand at the left; the others are numbers.
    pub(crate) texts: &'static [usize],
}

/// For a terminal.
pub(crate) fn write_text(sections: &[Section], out: &mut dyn Write) -> io::Result<()> {
    for section in sections {
        writeln!(out, "{}", section.title)?;
        if let Some(rows) = &section.rows {
            writeln!(out, "{}", layout(rows))?;
        }
        for line in &section.lines {
            writeln!(out, "  {line}")?;
        }
        writeln!(out)?;
    }
    Ok(())
}

fn layout(rows: &Rows) -> String {
    let mut table = Table::new();
    let mut style = presets::NOTHING;
    style.header_separator = LineStyle::none().fill('─').junction('─');
    table
        .load_style(style)
        .set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(&rows.head);
    for row in &rows.body {
        table.add_row(row);
    }
    for (at, column) in table.column_iter_mut().enumerate() {
        if !rows.texts.contains(&at) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt()
}

/// For documents.
pub(crate) fn write_markdown(sections: &[Section], out: &mut dyn Write) -> io::Result<()> {
    let escaped = |text: &String| text.replace('|', "\\|").replace('\n', " ");
    let row = |cells: &[String]| {
        let cells: Vec<String> = cells.iter().map(escaped).collect();
        format!("| {} |", cells.join(" | "))
    };
    for section in sections {
        writeln!(out, "## {}\n", section.title)?;
        if let Some(rows) = &section.rows {
            writeln!(out, "{}", row(&rows.head))?;
            let rules: Vec<&str> = (0..rows.head.len())
                .map(|at| {
                    if rows.texts.contains(&at) {
                        "---"
                    } else {
                        "---:"
                    }
                })
                .collect();
            writeln!(out, "| {} |", rules.join(" | "))?;
            for cells in &rows.body {
                writeln!(out, "{}", row(cells))?;
            }
            writeln!(out)?;
        }
        for line in &section.lines {
            writeln!(out, "- {}", escaped(line))?;
        }
        if !section.lines.is_empty() {
            writeln!(out)?;
        }
    }
    Ok(())
}

/// For papers: a `table` for each section, remarks below it; sections without a table are comments.
pub(crate) fn write_latex(sections: &[Section], out: &mut dyn Write) -> io::Result<()> {
    writeln!(
        out,
        "% Written by optape {}. Needs \\usepackage{{booktabs}}.",
        env!("CARGO_PKG_VERSION")
    )?;
    for section in sections {
        writeln!(out)?;
        let Some(rows) = &section.rows else {
            writeln!(out, "% {}", one_line(&section.title))?;
            for line in &section.lines {
                writeln!(out, "%   {}", one_line(line))?;
            }
            continue;
        };
        let columns: String = (0..rows.head.len())
            .map(|at| if rows.texts.contains(&at) { 'l' } else { 'r' })
            .collect();
        writeln!(out, "\\begin{{table}}")?;
        writeln!(out, "  \\centering")?;
        writeln!(out, "  \\caption{{{}}}", latex(&section.title))?;
        writeln!(out, "  \\begin{{tabular}}{{{columns}}}")?;
        writeln!(out, "    \\toprule")?;
        writeln!(out, "    {} \\\\", latex_row(&rows.head))?;
        writeln!(out, "    \\midrule")?;
        for cells in &rows.body {
            writeln!(out, "    {} \\\\", latex_row(cells))?;
        }
        writeln!(out, "    \\bottomrule")?;
        writeln!(out, "  \\end{{tabular}}")?;
        for line in &section.lines {
            writeln!(out, "  \\par{{\\footnotesize {}}}", latex(line))?;
        }
        writeln!(out, "\\end{{table}}")?;
    }
    Ok(())
}

/// A trace is untrusted: a line break would end a comment.
fn one_line(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

fn latex_row(cells: &[String]) -> String {
    let cells: Vec<String> = cells.iter().map(|cell| latex(cell)).collect();
    // A row that begins with a bracket would be the optional argument of the line break before it.
    let row = cells.join(" & ");
    if row.starts_with('[') {
        format!("{{}}{row}")
    } else {
        row
    }
}

/// Escapes what LaTeX takes for commands; digits stay together, and a unit with its number.
fn latex(text: &str) -> String {
    let text = one_line(text);
    let characters: Vec<char> = text.chars().collect();
    let mut escaped = String::with_capacity(text.len());
    for (at, &c) in characters.iter().enumerate() {
        match c {
            '\\' => escaped.push_str("\\textbackslash{}"),
            '~' => escaped.push_str("\\textasciitilde{}"),
            '^' => escaped.push_str("\\textasciicircum{}"),
            '<' => escaped.push_str("\\textless{}"),
            '>' => escaped.push_str("\\textgreater{}"),
            '|' => escaped.push_str("\\textbar{}"),
            '{' | '}' | '$' | '&' | '#' | '_' | '%' => {
                escaped.push('\\');
                escaped.push(c);
            }
            ' ' => {
                let digit = |c: Option<&char>| c.is_some_and(char::is_ascii_digit);
                let after_digit = at > 0 && digit(characters.get(at - 1));
                let rest = characters.get(at + 1..).unwrap_or_default();
                if after_digit && is_group_of_three(rest) {
                    escaped.push_str("\\,");
                } else if after_digit && is_unit(rest) {
                    escaped.push('~');
                } else {
                    escaped.push(' ');
                }
            }
            'u' if is_micro(&characters, at) => escaped.push_str("\\textmu{}"),
            _ => escaped.push(c),
        }
    }
    escaped
}

/// Exactly three digits: the rest of a number that is written in groups.
fn is_group_of_three(rest: &[char]) -> bool {
    rest.len() >= 3
        && rest.iter().take(3).all(char::is_ascii_digit)
        && !rest.get(3).is_some_and(char::is_ascii_digit)
}

/// The word that begins here is a unit of energy, power, time or rate, or a prefix alone at the end.
fn is_unit(rest: &[char]) -> bool {
    let word: String = rest.iter().take_while(|c| **c != ' ').collect();
    let word = word.trim_end_matches([',', ';', ')', '.']);
    ["pJ", "nJ", "uJ", "mJ", "J", "W", "s", "ms", "us", "B", "%"].contains(&word)
}

/// The `u` of `uJ` or `us`, behind a number.
fn is_micro(characters: &[char], at: usize) -> bool {
    let before = |back: usize| at.checked_sub(back).and_then(|at| characters.get(at));
    let behind_number = before(1) == Some(&' ') && before(2).is_some_and(char::is_ascii_digit);
    let unit = matches!(characters.get(at + 1), Some('J' | 's'));
    let ends = characters.get(at + 2).is_none_or(|c| !c.is_alphanumeric());
    behind_number && unit && ends
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latex_is_escaped_and_numbers_stay_together() {
        assert_eq!(
            latex("aten._to_copy & 50 %"),
            "aten.\\_to\\_copy \\& 50~\\%"
        );
        assert_eq!(latex("1 234 567 of 12 ops"), "1\\,234\\,567 of 12 ops");
        assert_eq!(latex("4.2 uJ of us"), "4.2~\\textmu{}J of us");
        assert_eq!(
            latex("a\\input{x}\n%"),
            "a\\textbackslash{}input\\{x\\} \\%"
        );
        assert_eq!(latex("usual 3 users"), "usual 3 users");
    }

    #[test]
    fn no_text_of_a_trace_leaves_a_comment_or_a_cell() {
        let section = Section {
            title: "Head".to_owned(),
            rows: None,
            lines: vec!["command\n\\evil".to_owned()],
        };
        let table = Section {
            title: "T".to_owned(),
            rows: Some(Rows {
                head: vec!["a".to_owned(), "b".to_owned()],
                body: vec![vec!["[x]".to_owned(), "1\\\\ & 2".to_owned()]],
                texts: &[0],
            }),
            lines: Vec::new(),
        };
        let mut text = Vec::new();
        write_latex(&[section, table], &mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains("%   command \\evil\n"), "{text}");
        assert!(
            text.contains("    {}[x] & 1\\textbackslash{}\\textbackslash{} \\& 2 \\\\\n"),
            "{text}"
        );
    }
}
