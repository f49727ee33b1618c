//! Configuration: values for flags from files and the environment, below what the command line says.
//!
//! Nothing here knows a flag by name. What a layer says becomes the default value of the flag in the tree of commands that clap parses
//! with, so every subcommand that there is can be configured: keys are long flags, in a table per subcommand, those of all
//! subcommands at the top. A flag that is given, by hand or by its own variable, takes out what it conflicts with.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, ValueHint};
use optape_replay::{nearest, position};
use toml::de::{DeTable, DeValue};

use crate::exit::Failure;

/// The project's file: in the current directory, or above it up to the root of its repository.
pub const PROJECT_FILE: &str = "optape.toml";
/// The flag that names another file.
const FILE_FLAG: &str = "config";

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A file, with the line, from 1.
    File(PathBuf, usize),
    /// A variable.
    Environment(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path, line) => write!(f, "{}:{line}", path.display()),
            Self::Environment(name) => f.write_str(name),
        }
    }
}

/// What the layers say about one flag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// As they would stand on the command line; `true` and `false` for switches.
    pub values: Vec<String>,
    /// Whose word it is.
    pub origin: Origin,
}

/// The files that are looked at, lowest first; whether each is there.
pub type Files = Vec<(PathBuf, bool)>;

/// All layers between what is built in and the command line, merged.
#[derive(Clone, Debug, Default)]
pub struct Layers {
    /// By path of subcommands (empty: all of them) and long flag.
    settings: BTreeMap<(Vec<String>, String), Setting>,
    /// What was looked at.
    pub files: Files,
}

impl Layers {
    /// Reads the user's file, the project's, and `named`, then the environment. `command` says which keys there are.
    ///
    /// # Errors
    /// A usage error with place and the nearest key or value for the first mistake; where `named` is not there.
    pub fn read(command: &Command, named: Option<&Path>) -> anyhow::Result<Self> {
        let mut layers = Self::default();
        let places = user_file().into_iter().chain(project_file());
        for (path, must) in places
            .map(|path| (path, false))
            .chain(named.map(|path| (path.to_owned(), true)))
        {
            match std::fs::read_to_string(&path) {
                Ok(text) => {
                    layers.file(command, &path, &text)?;
                    layers.files.push((path, true));
                }
                Err(error) if !must && error.kind() == std::io::ErrorKind::NotFound => {
                    layers.files.push((path, false));
                }
                Err(error) => {
                    return Err(error).with_context(|| {
                        format!("cannot read the configuration {}", path.display())
                    });
                }
            }
        }
        layers.environment(command, std::env::vars_os())?;
        Ok(layers)
    }

    /// What they say about a flag.
    #[must_use]
    pub fn get(&self, path: &[String], flag: &str) -> Option<&Setting> {
        self.settings.get(&(path.to_vec(), flag.to_owned()))
    }

    /// The commands with the layers' values as defaults, but for those that conflict with what was `given`.
    #[must_use]
    pub fn apply(&self, command: Command, given: &ArgMatches) -> Command {
        let mut built = command.clone();
        built.build();
        self.apply_at(command, &built, given, &mut Vec::new())
    }

    fn apply_at(
        &self,
        mut command: Command,
        built: &Command,
        given: &ArgMatches,
        path: &mut Vec<String>,
    ) -> Command {
        let flags: Vec<Arg> = flags(&command).cloned().collect();
        for flag in flags {
            let long = flag.get_long().unwrap_or_default();
            if let Some(setting) = self.get(path, long)
                && !conflicts(&flag, built, given)
            {
                let values = setting.values.clone();
                command = command.mut_arg(flag.get_id(), |arg| arg.default_values(values));
            }
        }
        if let Some((name, given)) = given.subcommand()
            && let Some(inner) = built.find_subcommand(name)
        {
            path.push(name.to_owned());
            command = command.mut_subcommand(name, |c| self.apply_at(c, inner, given, path));
            path.pop();
        }
        command
    }

    fn file(&mut self, command: &Command, path: &Path, text: &str) -> anyhow::Result<()> {
        let file = File {
            path,
            text,
            command,
        };
        let table = DeTable::parse(text)
            .map_err(|e| file.wrong(e.span().unwrap_or(0..0), e.message().to_owned()))?;
        self.table(&file, command, table.get_ref(), &mut Vec::new())
    }

    fn table(
        &mut self,
        file: &File<'_>,
        command: &Command,
        table: &DeTable<'_>,
        path: &mut Vec<String>,
    ) -> anyhow::Result<()> {
        for (key, value) in table {
            let name = key.get_ref().as_ref();
            let inner = command.find_subcommand(name);
            if let (Some(inner), DeValue::Table(table)) = (inner, value.get_ref()) {
                path.push(inner.get_name().to_owned());
                self.table(file, inner, table, path)?;
                path.pop();
            } else if let Some(flag) = flags(command).find(|flag| flag.get_long() == Some(name)) {
                let values = file.values(flag, path, value.get_ref(), value.span())?;
                let (line, _) = position(file.text, key.span().start);
                let origin = Origin::File(file.path.to_owned(), line);
                self.settings
                    .insert((path.clone(), name.to_owned()), Setting { values, origin });
            } else if inner.is_some() {
                let message = format!("'{name}' is a table: write [{name}]");
                return Err(file.wrong(value.span(), message).into());
            } else {
                return Err(file
                    .wrong(key.span(), unknown_key(command, path, name))
                    .into());
            }
        }
        Ok(())
    }

    /// `OPTAPE_RECORD_STATS` is `--stats` of `optape record`, `OPTAPE_COLOR` is `--color` of all.
    fn environment(
        &mut self,
        command: &Command,
        variables: impl Iterator<Item = (OsString, OsString)>,
    ) -> anyhow::Result<()> {
        let variables: BTreeMap<String, OsString> = variables
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
            .filter(|(name, value)| name.starts_with("OPTAPE_") && !value.is_empty())
            .collect();
        self.variables(command, command, &variables, &mut Vec::new())
    }

    fn variables(
        &mut self,
        root: &Command,
        command: &Command,
        variables: &BTreeMap<String, OsString>,
        path: &mut Vec<String>,
    ) -> anyhow::Result<()> {
        for flag in flags(command) {
            let long = flag.get_long().unwrap_or_default();
            let name = variable(path, long);
            // A variable of the flag's own is clap's, which puts it above all layers.
            if flag.get_env().is_some_and(|env| env == name.as_str()) {
                continue;
            }
            let Some(value) = variables.get(&name) else {
                continue;
            };
            let text = value
                .to_str()
                .ok_or_else(|| Failure::usage(format!("{name}: the value is no text in UTF-8")))?;
            let text = switch(flag, text).unwrap_or(text);
            if let Err(message) = check(root, path, flag, text) {
                return Err(Failure::usage(format!("{name}: {message}")).into());
            }
            let setting = Setting {
                values: vec![text.to_owned()],
                origin: Origin::Environment(name),
            };
            self.settings
                .insert((path.clone(), long.to_owned()), setting);
        }
        for inner in command.get_subcommands() {
            path.push(inner.get_name().to_owned());
            self.variables(root, inner, variables, path)?;
            path.pop();
        }
        Ok(())
    }
}

/// The variable of a flag.
#[must_use]
pub fn variable(path: &[String], long: &str) -> String {
    let words = path.iter().map(String::as_str).chain([long]);
    words.fold("OPTAPE".to_owned(), |name, word| {
        format!("{name}_{}", word.replace('-', "_").to_uppercase())
    })
}

/// The flags of a command that layers can set.
pub fn flags(command: &Command) -> impl Iterator<Item = &Arg> {
    command.get_arguments().filter(|arg| {
        let action = matches!(
            arg.get_action(),
            ArgAction::Set | ArgAction::Append | ArgAction::SetTrue | ArgAction::Count
        );
        action && !arg.is_hide_set() && arg.get_long().is_some_and(|long| long != FILE_FLAG)
    })
}

/// Whether a flag was given that excludes this one.
fn conflicts(flag: &Arg, command: &Command, given: &ArgMatches) -> bool {
    let excludes = |one: &Arg, other: &Arg| {
        command
            .get_arg_conflicts_with(one)
            .iter()
            .any(|conflict| conflict.get_id() == other.get_id())
    };
    let Some(flag) = command
        .get_arguments()
        .find(|a| a.get_id() == flag.get_id())
    else {
        return false;
    };
    command.get_arguments().any(|other| {
        let explicit = matches!(
            given.value_source(other.get_id().as_str()),
            Some(ValueSource::CommandLine | ValueSource::EnvVariable)
        );
        explicit && (excludes(flag, other) || excludes(other, flag))
    })
}

/// A file that is being read.
struct File<'a> {
    path: &'a Path,
    text: &'a str,
    /// The root of the commands.
    command: &'a Command,
}

impl File<'_> {
    fn wrong(&self, span: Range<usize>, message: String) -> Failure {
        let (line, column) = position(self.text, span.start);
        Failure::usage(format!(
            "{}:{line}:{column}: {message}",
            self.path.display()
        ))
    }

    fn values(
        &self,
        flag: &Arg,
        path: &[String],
        value: &DeValue<'_>,
        span: Range<usize>,
    ) -> Result<Vec<String>, Failure> {
        let name = flag.get_long().unwrap_or_default();
        match value {
            DeValue::Array(items) if matches!(flag.get_action(), ArgAction::Append) => items
                .iter()
                .map(|item| self.value(flag, path, item.get_ref(), item.span()))
                .collect(),
            DeValue::Array(_) => Err(self.wrong(span, format!("'{name}' is one value"))),
            value => Ok(vec![self.value(flag, path, value, span)?]),
        }
    }

    fn value(
        &self,
        flag: &Arg,
        path: &[String],
        value: &DeValue<'_>,
        span: Range<usize>,
    ) -> Result<String, Failure> {
        let name = flag.get_long().unwrap_or_default();
        let is_switch = matches!(flag.get_action(), ArgAction::SetTrue);
        let text = match value {
            DeValue::Boolean(value) => value.to_string(),
            _ if is_switch => {
                return Err(self.wrong(span, format!("'{name}' is true or false")));
            }
            DeValue::String(text) => text.to_string(),
            DeValue::Integer(number) => {
                i64::from_str_radix(&number.as_str().replace('_', ""), number.radix())
                    .map_or_else(|_| number.as_str().to_owned(), |n| n.to_string())
            }
            DeValue::Float(number) => number.as_str().replace('_', ""),
            _ => return Err(self.wrong(span, format!("'{name}' is a text or a number"))),
        };
        check(self.command, path, flag, &text).map_err(|message| self.wrong(span, message))?;
        let is_path = matches!(
            flag.get_value_hint(),
            ValueHint::FilePath | ValueHint::DirPath | ValueHint::AnyPath
        );
        Ok(match self.path.parent() {
            // Where a file names a file, it means it as seen from where it stands.
            Some(place) if is_path => place.join(text).to_string_lossy().into_owned(),
            _ => text,
        })
    }
}

/// What a variable's text means for a switch.
fn switch(flag: &Arg, text: &str) -> Option<&'static str> {
    if !matches!(flag.get_action(), ArgAction::SetTrue) {
        return None;
    }
    match text.to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Some("true"),
        "0" | "false" | "no" | "off" => Some("false"),
        _ => None,
    }
}

/// Asks clap whether the flag takes the value.
fn check(root: &Command, path: &[String], flag: &Arg, text: &str) -> Result<(), String> {
    let name = flag.get_long().unwrap_or_default();
    match flag.get_action() {
        ArgAction::SetTrue if text == "true" || text == "false" => return Ok(()),
        ArgAction::SetTrue => return Err(format!("'{name}' is true or false, not '{text}'")),
        ArgAction::Count if text.parse::<u8>().is_ok() => return Ok(()),
        ArgAction::Count => return Err(format!("'{name}' is a small number, not '{text}'")),
        _ => {}
    }
    let words = ["optape"]
        .into_iter()
        .chain(path.iter().map(String::as_str));
    let words = words.map(str::to_owned).chain([format!("--{name}={text}")]);
    let Err(error) = root.clone().try_get_matches_from(words) else {
        return Ok(());
    };
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        Some(ContextValue::Strings(texts)) if !texts.is_empty() => Some(texts.join(", ")),
        _ => None,
    };
    // Anything else, such as a positional that is missing, is no fault of this value.
    match error.kind() {
        ErrorKind::InvalidValue | ErrorKind::InvalidUtf8 => {
            let near = context(ContextKind::SuggestedValue)
                .map(|near| format!("; did you mean '{near}'?"));
            let known = context(ContextKind::ValidValue).map(|known| format!("; known: {known}"));
            Err(format!(
                "'{text}' is no value of '{name}'{}",
                near.or(known).unwrap_or_default()
            ))
        }
        ErrorKind::ValueValidation => {
            let why =
                std::error::Error::source(&error).map_or_else(String::new, |e| format!(": {e}"));
            Err(format!("'{text}' is no value of '{name}'{why}"))
        }
        _ => Ok(()),
    }
}

fn unknown_key(command: &Command, path: &[String], key: &str) -> String {
    let place = match path {
        [] => String::new(),
        path => format!(" in [{}]", path.join(".")),
    };
    let keys = flags(command).filter_map(Arg::get_long);
    let tables = command.get_subcommands().map(Command::get_name);
    let known: Vec<&str> = keys.chain(tables).collect();
    match nearest(key, known.iter().copied()) {
        Some(near) => format!("there is no key '{key}'{place}; did you mean '{near}'?"),
        None if known.is_empty() => format!("there is no key '{key}'{place}; it has none"),
        None => format!(
            "there is no key '{key}'{place}; known: {}",
            known.join(", ")
        ),
    }
}

fn user_file() -> Option<PathBuf> {
    let variable = |name| {
        let value = std::env::var_os(name).filter(|value| !value.is_empty());
        value.map(PathBuf::from).filter(|path| path.is_absolute())
    };
    variable("XDG_CONFIG_HOME")
        .or_else(|| Some(variable("HOME")?.join(".config")))
        .map(|place| place.join("optape/config.toml"))
}

/// The nearest one. Outside of a repository only the current directory is the project.
fn project_file() -> Option<PathBuf> {
    let here = std::env::current_dir().ok()?;
    let root = here.ancestors().find(|place| place.join(".git").exists());
    let end = root.unwrap_or(&here);
    let mut places = here.ancestors().take_while(|place| place.starts_with(end));
    places
        .find(|place| place.join(PROJECT_FILE).is_file())
        .map(|place| place.join(PROJECT_FILE))
        .or_else(|| Some(end.join(PROJECT_FILE)))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::options::Options;

    fn read(text: &str) -> Result<Layers, String> {
        let mut layers = Layers::default();
        let result = layers.file(&Options::command(), Path::new("/p/optape.toml"), text);
        result.map(|()| layers).map_err(|error| error.to_string())
    }

    fn values(layers: &Layers, table: &str, flag: &str) -> Vec<String> {
        let path: Vec<String> = table
            .split('.')
            .filter(|t| !t.is_empty())
            .map(str::to_owned)
            .collect();
        layers
            .get(&path, flag)
            .map(|s| s.values.clone())
            .unwrap_or_default()
    }

    #[test]
    fn values_of_every_shape_are_read() {
        let layers = read(
            "color = \"never\"\nverbose = 2\n[record]\nforce-torch = true\nring-size = \"8M\"\n\
             [replay]\ncounters = [\"mac\", \"ac\"]\nthreads = 0x4\ncosts = [\"mine.toml\"]\n",
        )
        .unwrap();
        assert_eq!(values(&layers, "", "color"), ["never"]);
        assert_eq!(values(&layers, "", "verbose"), ["2"]);
        assert_eq!(values(&layers, "record", "force-torch"), ["true"]);
        assert_eq!(values(&layers, "replay", "counters"), ["mac", "ac"]);
        assert_eq!(values(&layers, "replay", "threads"), ["4"]);
        assert_eq!(values(&layers, "replay", "costs"), ["/p/mine.toml"]);
        assert_eq!(
            layers
                .get(&["record".to_owned()], "ring-size")
                .unwrap()
                .origin,
            Origin::File("/p/optape.toml".into(), 5)
        );
    }

    #[test]
    fn mistakes_have_a_place_and_a_way_out() {
        let mistakes = [
            (
                "[record]\nstast = \"all\"\n",
                "2:1: there is no key 'stast' in [record]; did you mean 'stats'?",
            ),
            (
                "[recrod]\n",
                "1:2: there is no key 'recrod'; did you mean 'record'?",
            ),
            (
                "[record]\n  stats = \"rulse\"\n",
                "2:11: 'rulse' is no value of 'stats'; did you mean 'rules'?",
            ),
            (
                "[record]\nring-size = \"1K\"",
                "2:13: '1K' is no value of 'ring-size': too small; the smallest is 64K",
            ),
            (
                "[record]\nforce-torch = 1",
                "2:15: 'force-torch' is true or false",
            ),
            ("[record]\nstats = [\"all\"]", "2:9: 'stats' is one value"),
            ("record = 1", "1:10: 'record' is a table: write [record]"),
            (
                "verbose = 1000",
                "1:11: 'verbose' is a small number, not '1000'",
            ),
            (
                "[replay]\nconfig = \"x\"",
                "2:1: there is no key 'config' in [replay]",
            ),
        ];
        for (text, expected) in mistakes {
            let error = read(text).map(|_| ()).unwrap_err();
            let rest = error.strip_prefix("/p/optape.toml:").unwrap();
            assert!(rest.starts_with(expected), "{text}: {error}");
        }
        assert!(
            read("[record\n")
                .map(|_| ())
                .unwrap_err()
                .starts_with("/p/optape.toml:1:")
        );
    }

    #[test]
    fn variables_are_named_after_flags() {
        let read = |name: &str, value: &str| {
            let mut layers = Layers::default();
            let variables = [(OsString::from(name), OsString::from(value))];
            layers
                .environment(&Options::command(), variables.into_iter())
                .map(|()| layers)
                .map_err(|error| error.to_string())
        };
        let layers = read("OPTAPE_REPLAY_FROM_EVENTS", "yes").unwrap();
        assert_eq!(values(&layers, "replay", "from-events"), ["true"]);
        assert_eq!(
            read("OPTAPE_COLOR", "pink").map(|_| ()).unwrap_err(),
            "OPTAPE_COLOR: 'pink' is no value of 'color'; known: auto, always, never"
        );
        assert!(read("OPTAPE_REPLAY_STRICT", "perhaps").is_err());
        assert!(
            read("OPTAPE_RUN", "/dev/shm/x")
                .unwrap()
                .settings
                .is_empty()
        );
    }

    /// Over every flag that there is: none of them breaks the layers.
    #[test]
    fn every_flag_can_stand_in_a_file() {
        fn each(command: &Command, path: &mut Vec<String>, all: &mut Vec<(Vec<String>, Arg)>) {
            all.extend(flags(command).map(|flag| (path.clone(), flag.clone())));
            for inner in command.get_subcommands() {
                path.push(inner.get_name().to_owned());
                each(inner, path, all);
                path.pop();
            }
        }
        let mut all = Vec::new();
        each(&Options::command(), &mut Vec::new(), &mut all);
        assert!(all.len() > 30);
        for (path, flag) in all {
            let long = flag.get_long().unwrap();
            let known = flag.get_possible_values();
            // Sizes have a least value, intervals a greatest; what is selected of modules has a colon, a range of steps dots, modules that
            // correspond an equals sign.
            let values = match flag.get_action() {
                ArgAction::SetTrue => vec!["true".to_owned()],
                ArgAction::Count => vec!["1".to_owned()],
                _ => match known.first() {
                    Some(value) => vec![format!("\"{}\"", value.get_name())],
                    None => ["1048576", "1", "1s", "LIFNode:v", "1..2", "a=b"]
                        .map(|value| format!("\"{value}\""))
                        .to_vec(),
                },
            };
            let table = if path.is_empty() {
                String::new()
            } else {
                format!("[{}]\n", path.join("."))
            };
            let layers = values
                .iter()
                .find_map(|value| read(&format!("{table}{long} = {value}\n")).ok());
            let settings = layers.map(|layers| layers.settings.len());
            assert_eq!(settings, Some(1), "{table}{long}");
        }
    }
}
