//! Rule sets of the user's, in TOML: a built-in set with rules added or replaced, counters of one's own, modules left out.
//!
//! ```toml
//! name = "lab"
//! extends = "optape"
//! ignore = ["BatchNorm*"]
//!
//! [define]
//! fan_out = "size(weight, 0) * elements_from(weight, 2)"
//!
//! [counters.input_spikes]
//! unit = "spike"
//!
//! [counters.input_spikes.rules."aten::convolution"]
//! formula = "if(binary(input), nonzeros(input), 0)"
//! source = "our definition"
//! tests = [
//!   { given = { input = "float32[1, 2, 4, 4]" }, statistics = { "binary(input)" = true, "nonzeros(input)" = 5 }, expect = 5 },
//! ]
//! ```
//!
//! A formula is that of one call. Its statistics are sums over all calls of a kind, so it adds them and multiplies them with what is the same for
//! every call. Each rule has its source and its tests, which run when the file is read.

mod counter;
mod self_test;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use toml::de::{DeTable, DeValue};

use self::counter::{Extended, ignoring, owned};
use super::{Counter, RULE_SETS, Rule, RuleError, RuleSet};
use crate::error::{ReplayError, nearest, position};
use crate::expression::exact::{self, Calls, Definitions};
use crate::expression::{Fault, Formula, Mistake};
use crate::selection::Glob;

type Table<'t> = DeTable<'t>;

impl RuleSet {
    /// A built-in rule set by name, or one of the user's from a TOML file.
    ///
    /// # Errors
    /// Where there is no such set or file; [`ReplayError::Rules`] with line and column of the first mistake in a file.
    pub fn load(name: &str) -> Result<Self, ReplayError> {
        let path = Path::new(name);
        let is_file = path
            .extension()
            .is_some_and(|extension| extension.eq_ignore_ascii_case("toml"))
            || name.contains(std::path::MAIN_SEPARATOR);
        if is_file {
            read(path, &mut Vec::new())
        } else {
            Self::named(name)
        }
    }

    /// Several rule sets, of which no two have one name.
    ///
    /// # Errors
    /// As [`Self::load`], and where two have.
    pub fn load_all<N: AsRef<str>>(names: &[N]) -> Result<Vec<Self>, ReplayError> {
        let mut sets: Vec<(Self, &str)> = Vec::with_capacity(names.len());
        for name in names {
            let name = name.as_ref();
            let set = Self::load(name)?;
            if let Some((_, other)) = sets.iter().find(|(other, _)| other.name == set.name) {
                return Err(ReplayError::Selection(format!(
                    "{other} and {name} are rule sets of one name, '{}': give one of them another",
                    set.name
                )));
            }
            sets.push((set, name));
        }
        Ok(sets.into_iter().map(|(set, _)| set).collect())
    }
}

/// A file that is being read, on behalf of those before it.
struct Link {
    real: PathBuf,
    shown: String,
    name: String,
}

fn read(path: &Path, chain: &mut Vec<Link>) -> Result<RuleSet, ReplayError> {
    let io = |source| ReplayError::Io {
        path: path.to_path_buf(),
        source,
    };
    let text = std::fs::read_to_string(path).map_err(io)?;
    let real = path.canonicalize().map_err(io)?;
    let shown = path.display().to_string();
    parse(&text, &shown, path, real, chain)
}

/// A file's text, and where it is.
struct File<'t> {
    text: &'t str,
    path: &'t str,
}

impl File<'_> {
    fn mistake(&self, span: Range<usize>, message: impl Into<String>) -> ReplayError {
        let (line, column) = position(self.text, span.start);
        ReplayError::Rules(Mistake {
            path: self.path.to_owned(),
            line,
            column,
            message: message.into(),
        })
    }

    fn table<'v, 't>(
        &self,
        value: &'v toml::Spanned<DeValue<'t>>,
        what: &str,
    ) -> Result<&'v Table<'t>, ReplayError> {
        match value.get_ref() {
            DeValue::Table(table) => Ok(table),
            _ => Err(self.mistake(value.span(), format!("{what} is a table"))),
        }
    }

    fn string<'v>(
        &self,
        value: &'v toml::Spanned<DeValue<'_>>,
        what: &str,
    ) -> Result<&'v str, ReplayError> {
        match value.get_ref() {
            DeValue::String(text) if !text.trim().is_empty() => Ok(text),
            _ => Err(self.mistake(value.span(), format!("{what} is a text"))),
        }
    }

    fn number(&self, value: &toml::Spanned<DeValue<'_>>, what: &str) -> Result<f64, ReplayError> {
        crate::energy::number_of(value.get_ref())
            .filter(|number| number.is_finite() && *number >= 0.0)
            .ok_or_else(|| self.mistake(value.span(), format!("{what} is a number of at least 0")))
    }

    fn globs(&self, value: &toml::Spanned<DeValue<'_>>) -> Result<Vec<Glob>, ReplayError> {
        let wanted = || self.mistake(value.span(), "'ignore' is a list of classes or scopes: [\"BatchNorm*\"]");
        let DeValue::Array(list) = value.get_ref() else {
            return Err(wanted());
        };
        list.iter()
            .map(|item| match item.get_ref() {
                DeValue::String(text) if !text.is_empty() => Ok(Glob::new(text)),
                _ => Err(wanted()),
            })
            .collect()
    }

    fn unknown(&self, span: Range<usize>, key: &str, known: &[&str]) -> ReplayError {
        let message = match nearest(key, known.iter().copied()) {
            Some(nearest) => format!("there is no key '{key}'; did you mean '{nearest}'?"),
            None => format!("there is no key '{key}'; there are: {}", known.join(", ")),
        };
        self.mistake(span, message)
    }

    fn formula(&self, value: &toml::Spanned<DeValue<'_>>, what: &str) -> Result<Formula, ReplayError> {
        let text = self.string(value, what)?;
        Formula::parse(text, self.path, self.text, value.span()).map_err(ReplayError::Rules)
    }
}

fn parse(
    text: &str,
    shown: &str,
    path: &Path,
    real: PathBuf,
    chain: &mut Vec<Link>,
) -> Result<RuleSet, ReplayError> {
    const KEYS: [&str; 7] = [
        "name",
        "version",
        "description",
        "extends",
        "ignore",
        "define",
        "counters",
    ];
    let file = File { text, path: shown };
    let whole = DeTable::parse(text)
        .map_err(|e| file.mistake(e.span().unwrap_or(0..0), e.message().to_owned()))?;
    let table = whole.get_ref();
    if let Some((key, _)) = table.iter().find(|(key, _)| !KEYS.contains(&key.get_ref().as_ref())) {
        return Err(file.unknown(key.span(), key.get_ref(), &KEYS));
    }
    let value = |name: &str| table.iter().find(|(k, _)| k.get_ref() == name).map(|(_, v)| v);
    let named = value("name").ok_or_else(|| file.mistake(0..0, "'name' is missing: a rule set has one"))?;
    let name = file.string(named, "'name'")?.to_owned();
    if let Some(built_in) = RULE_SETS.iter().find(|known| **known == name) {
        let message = format!("there is a rule set '{built_in}' already, which is built in; give this one another name");
        return Err(file.mistake(named.span(), message));
    }
    if let Some(other) = chain.iter().find(|link| link.real != real && link.name == name) {
        let message = format!("{} is a rule set '{name}' already; give one of them another name", other.shown);
        return Err(file.mistake(named.span(), message));
    }
    if let Some(at) = chain.iter().position(|link| link.real == real) {
        let mut links: Vec<&str> = chain.iter().skip(at).map(|link| link.shown.as_str()).collect();
        links.push(shown);
        let message = format!("rule sets extend each other in a circle: {}", links.join(" -> "));
        return Err(file.mistake(named.span(), message));
    }
    chain.push(Link {
        real,
        shown: shown.to_owned(),
        name: name.clone(),
    });
    let base = match value("extends") {
        None => None,
        Some(extended) => {
            let wanted = file.string(extended, "'extends'")?;
            let base = if wanted.to_lowercase().ends_with(".toml") {
                let beside = path.parent().unwrap_or(Path::new("")).join(wanted);
                read(&beside, chain)
            } else {
                RuleSet::named(wanted)
            };
            Some(base.map_err(|error| match error {
                error @ ReplayError::Rules(_) => error,
                other => file.mistake(extended.span(), other.to_string()),
            })?)
        }
    };
    let version = match value("version") {
        None => 1,
        Some(version) => {
            let number = file.number(version, "'version'")?;
            if number.fract() != 0.0 || number > f64::from(u32::MAX) {
                return Err(file.mistake(version.span(), "'version' is a whole number"));
            }
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "just looked at"
            )]
            let version = number as u32;
            version
        }
    };
    let description = match value("description") {
        None => String::new(),
        Some(text) => file.string(text, "'description'")?.to_owned(),
    };
    let ignored = value("ignore").map_or(Ok(Vec::new()), |globs| file.globs(globs))?;
    let definitions = definitions(&file, value("define"))?;
    let mut set = put_on(base, name, version, &description, shown);
    counters(&file, value("counters"), &definitions, &mut set, &ignored)?;
    Ok(set)
}

/// The set that a file starts from: the one that it extends, or nothing.
fn put_on(
    base: Option<RuleSet>,
    name: String,
    version: u32,
    description: &str,
    path: &str,
) -> RuleSet {
    match base {
        None => RuleSet {
            name: name.into(),
            extends: None,
            version,
            description: join(description, path).into(),
            counters: Vec::new(),
            accumulations_are_add: false,
            lists_unsupported: false,
            models: &[],
        },
        Some(base) => {
            let built_in = RULE_SETS.iter().copied().find(|known| *known == base.name);
            let origin = format!("{path}, extends {} {}", base.name, base.version);
            RuleSet {
                extends: built_in.or(base.extends),
                name: name.into(),
                version,
                description: join(description, &origin).into(),
                ..base
            }
        }
    }
}

fn join(description: &str, origin: &str) -> String {
    if description.is_empty() {
        origin.to_owned()
    } else {
        format!("{description} ({origin})")
    }
}

fn definitions(
    file: &File<'_>,
    value: Option<&toml::Spanned<DeValue<'_>>>,
) -> Result<Arc<Definitions>, ReplayError> {
    let mut all = Definitions::new();
    if let Some(value) = value {
        for (key, value) in file.table(value, "'define'")? {
            let name = key.get_ref();
            let is_name = name
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || c == '_')
                && !name.starts_with(|c: char| c.is_ascii_digit())
                && !["out", "outputs", "and", "or", "not", "true", "false"].contains(&name.as_ref());
            if !is_name {
                let message = format!("'{name}' is no name for a definition: letters, digits and _, and no word of the language");
                return Err(file.mistake(key.span(), message));
            }
            let formula = file.formula(value, &format!("'{name}'"))?;
            all.insert(name.to_string(), formula);
        }
    }
    match exact::recursion(&all) {
        Some(mistake) => Err(ReplayError::Rules(mistake)),
        None => Ok(Arc::new(all)),
    }
}

/// Adds the file's counters, and its rules to those that there are.
fn counters(
    file: &File<'_>,
    value: Option<&toml::Spanned<DeValue<'_>>>,
    definitions: &Arc<Definitions>,
    set: &mut RuleSet,
    ignored: &[Glob],
) -> Result<(), ReplayError> {
    let mut given: BTreeMap<String, Given> = BTreeMap::new();
    if let Some(value) = value {
        for (key, value) in file.table(value, "'counters'")? {
            let name = key.get_ref().as_ref();
            let parsed = one(file, name, key.span(), value, definitions, set)?;
            given.insert(name.to_owned(), parsed);
        }
    }
    let all = std::mem::take(&mut set.counters);
    let origin = set.description.to_string();
    let extended = |base: Option<Box<dyn Counter>>, name: &str, given: Option<Given>| {
        let given = given.unwrap_or_default();
        let mut globs = ignored.to_vec();
        globs.extend(given.ignored);
        let unit = base.as_ref().map_or(given.unit, |base| base.unit().to_owned());
        let base = match base {
            Some(base) if !given.settings.is_empty() || base.name() != name => {
                let mut settings = base.settings();
                settings.extend(given.settings);
                base.configured(name, &settings).or(Some(base))
            }
            other => other,
        };
        Box::new(Extended {
            name: name.to_owned(),
            unit,
            base,
            rules: given.rules,
            ignoring: ignoring(&globs, &origin),
            ignored: globs,
        }) as Box<dyn Counter>
    };
    // Those that others are like are made again, since each has its own.
    let mut fresh: Vec<(String, Given, Option<Box<dyn Counter>>)> = Vec::new();
    let names: Vec<String> = all.iter().map(|counter| counter.name().to_owned()).collect();
    for (name, parsed) in &mut given {
        if names.contains(name) {
            continue;
        }
        let like = parsed.like.as_ref().and_then(|like| {
            let counter = all.iter().find(|counter| counter.name() == *like)?;
            counter.configured(name, &counter.settings())
        });
        fresh.push((name.clone(), std::mem::take(parsed), like));
    }
    for counter in all {
        let name = counter.name().to_owned();
        let changes = given.remove(&name);
        set.counters.push(match changes {
            None if ignored.is_empty() => counter,
            changes => extended(Some(counter), &name, changes),
        });
    }
    for (name, parsed, like) in fresh {
        set.counters.push(extended(like, &name, Some(parsed)));
    }
    Ok(())
}

/// What a file says of a counter.
#[derive(Default)]
struct Given {
    unit: String,
    like: Option<String>,
    ignored: Vec<Glob>,
    settings: BTreeMap<&'static str, f64>,
    rules: BTreeMap<String, Rule>,
}

fn one(
    file: &File<'_>,
    name: &str,
    span: Range<usize>,
    value: &toml::Spanned<DeValue<'_>>,
    definitions: &Arc<Definitions>,
    set: &RuleSet,
) -> Result<Given, ReplayError> {
    let table = file.table(value, &format!("the counter '{name}'"))?;
    let find = |wanted: &str| table.iter().find(|(k, _)| k.get_ref() == wanted).map(|(_, v)| v);
    let mut given = Given::default();
    let known = set.counter(name);
    let like = match (find("like"), known) {
        (Some(like), Some(_)) => {
            let message = format!("there is a counter '{name}' already: give its settings without 'like', or this one another name");
            return Err(file.mistake(like.span(), message));
        }
        (Some(like), None) => {
            let wanted = file.string(like, "'like'")?;
            let counter = set.counter(wanted).ok_or_else(|| {
                let error = ReplayError::unknown_name("counter", wanted, set.counter_names());
                file.mistake(like.span(), error.to_string())
            })?;
            if counter.configured(name, &counter.settings()).is_none() {
                let message = format!("the counter '{wanted}' has no settings: there is no other one like it");
                return Err(file.mistake(like.span(), message));
            }
            given.like = Some(wanted.to_owned());
            Some(counter)
        }
        (None, known) => known,
    };
    let settings = like.map(|counter| counter.settings()).unwrap_or_default();
    for (key, value) in table {
        match key.get_ref().as_ref() {
            "like" => {}
            "unit" => {
                let unit = file.string(value, "'unit'")?;
                match like {
                    Some(counter) if counter.unit() != unit => {
                        let message = format!("the counter '{}' counts in {}, not in {unit}", counter.name(), counter.unit());
                        return Err(file.mistake(value.span(), message));
                    }
                    _ => given.unit = unit.to_owned(),
                }
            }
            "ignore" => given.ignored = file.globs(value)?,
            "rules" => {
                if let Some(counter) = like
                    && counter.simulation().is_some()
                {
                    let message = format!("the counter '{}' follows the stream and has no rules by op", counter.name());
                    return Err(file.mistake(value.span(), message));
                }
                for (op, rule) in file.table(value, "'rules'")? {
                    let parsed = rule_of(file, op.get_ref(), op.span(), rule, definitions)?;
                    given.rules.insert(op.get_ref().to_string(), parsed);
                }
            }
            other => match settings.get_key_value(other) {
                Some((setting, _)) => {
                    let number = file.number(value, &format!("'{setting}'"))?;
                    given.settings.insert(setting, number);
                }
                None => {
                    let mut known = vec!["unit", "like", "ignore", "rules"];
                    known.extend(settings.keys());
                    return Err(file.unknown(key.span(), other, &known));
                }
            },
        }
    }
    if like.is_none() && given.unit.is_empty() {
        return Err(file.mistake(span, format!("the counter '{name}' is new: give it a 'unit'")));
    }
    Ok(given)
}

/// `{ formula, source, tests }`, or `{ zero, source }`.
fn rule_of(
    file: &File<'_>,
    op: &str,
    span: Range<usize>,
    value: &toml::Spanned<DeValue<'_>>,
    definitions: &Arc<Definitions>,
) -> Result<Rule, ReplayError> {
    const KEYS: [&str; 4] = ["formula", "zero", "source", "tests"];
    if !op.contains("::") || op.contains('*') {
        let message = format!("'{op}' is no op: write its full name, 'aten::mm' or 'aten::add.Tensor', as `optape rules` and reports name it (aten.mm.default is 'aten::mm')");
        return Err(file.mistake(span, message));
    }
    let table = file.table(value, &format!("the rule of {op}"))?;
    if let Some((key, _)) = table.iter().find(|(k, _)| !KEYS.contains(&k.get_ref().as_ref())) {
        return Err(file.unknown(key.span(), key.get_ref(), &KEYS));
    }
    let find = |wanted: &str| table.iter().find(|(k, _)| k.get_ref() == wanted).map(|(_, v)| v);
    let source = find("source").ok_or_else(|| {
        file.mistake(span.clone(), format!("the rule of {op} has no 'source': say where it comes from"))
    })?;
    let source = file.string(source, "'source'")?;
    match (find("formula"), find("zero")) {
        (None, Some(reason)) => {
            if let Some(tests) = find("tests") {
                return Err(file.mistake(tests.span(), "a rule that counts nothing has no tests"));
            }
            let reason = file.string(reason, "'zero'")?;
            Ok(Rule::zero(reason.to_owned(), source.to_owned()))
        }
        (Some(formula), None) => {
            let formula = file.formula(formula, "'formula'")?;
            let tests = find("tests").ok_or_else(|| {
                let message = format!(
                    "the rule of {op} has no 'tests': give one call and what it counts, tests = [{{ given = {{ self = \"float32[2, 3]\" }}, \
                     expect = 6 }}]"
                );
                file.mistake(span, message)
            })?;
            self_test::run(file, op, &formula, definitions, tests)?;
            Ok(by_formula(formula, source, Arc::clone(definitions)))
        }
        (Some(_), Some(zero)) => Err(file.mistake(
            zero.span(),
            "a rule has a 'formula', or a reason why it is 'zero', not both",
        )),
        (None, None) => Err(file.mistake(
            span,
            format!("the rule of {op} has neither a 'formula' nor a reason why it is 'zero'"),
        )),
    }
}

fn by_formula(formula: Formula, source: &str, definitions: Arc<Definitions>) -> Rule {
    let text = formula.text.clone();
    Rule::per_row(text, owned(source), Vec::new(), move |row| {
        Calls::new(row, &definitions)
            .count(&formula)
            .map_err(|fault| match formula.placed(fault) {
                Fault::Missing(missing) => RuleError::Missing(missing),
                Fault::Placed(mistake) => RuleError::Mistaken(Box::new(Mistake {
                    message: format!("{}, in a call of {}", mistake.message, row.op.qualified_name()),
                    ..mistake
                })),
                Fault::Mistake { message, .. } => {
                    RuleError::Mistaken(Box::new(formula.mistake(&message)))
                }
            })
    })
}

#[cfg(test)]
mod tests;
