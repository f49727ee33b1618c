//! Configuration: values for flags from files and the environment, below what the command line says.
//!
//! Nothing here knows a flag by name. What a layer says becomes the default value of the flag in the tree of commands that clap parses
//! with, so every subcommand that there is can be configured: keys are long flags, in a table per subcommand, those of all
//! subcommands at the top. What a layer says takes out what the layers below say of flags that conflict with it, and so does the command
//! line; two that conflict in one layer are a mistake.

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
use crate::switches;

/// The project's file: in the current directory, or above it up to the root of its repository.
pub const PROJECT_FILE: &str = "optape.toml";
/// The flag that names another file.
const FILE_FLAG: &str = "config";

/// Variables that are no flag's, and that users set.
const OTHER_VARIABLES: [&str; 3] = ["OPTAPE_LOG", "OPTAPE_BIN", "OPTAPE_CAPTURE_LIB"];
/// Variables by which a recording speaks to the processes that it records, and those of this repository's tests and tasks.
const OWN_VARIABLES: [&str; 17] = [
    "OPTAPE_ANNOUNCE",
    "OPTAPE_CRASH_ROUNDS",
    "OPTAPE_DETAIL",
    "OPTAPE_DIGITS",
    "OPTAPE_FAKE",
    "OPTAPE_FUZZ_ROUNDS",
    "OPTAPE_FUZZ_SEED",
    "OPTAPE_HOOK_BOXED",
    "OPTAPE_HOOK_KEY",
    "OPTAPE_HOOK_SOURCE",
    "OPTAPE_NVRTC_DIR",
    "OPTAPE_PARITY",
    "OPTAPE_PYTHON",
    "OPTAPE_SCHEDULE",
    "OPTAPE_TEST_EXTRA",
    "OPTAPE_TEST_RUN",
    "OPTAPE_TORCH_VERSIONS",
];

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A file, with the line, from 1.
    File(PathBuf, usize),
    /// A variable that is named after subcommand and flag.
    Environment(String),
    /// A variable of the flag's own, which is above those and which clap reads.
    OwnVariable(String),
}

impl Origin {
    fn is_same_layer(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::File(one, _), Self::File(other, _)) => one == other,
            (Self::Environment(_), Self::Environment(_))
            | (Self::OwnVariable(_), Self::OwnVariable(_)) => true,
            _ => false,
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path, line) => write!(f, "{}:{line}", path.display()),
            Self::Environment(name) | Self::OwnVariable(name) => f.write_str(name),
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
    /// A switch that is off, or an empty list: in nobody's way.
    off: bool,
}

impl Setting {
    fn new(flag: &Arg, values: Vec<String>, origin: Origin) -> Self {
        let off = match flag.get_action() {
            ArgAction::SetTrue | ArgAction::Count => values.iter().all(|text| is_falsey(text)),
            _ => values.is_empty(),
        };
        Self {
            values,
            origin,
            off,
        }
    }
}

/// What switches off, as clap reads the variables of switches.
pub(crate) fn is_falsey(text: &str) -> bool {
    matches!(
        text.to_ascii_lowercase().as_str(),
        "" | "0" | "false" | "f" | "no" | "n" | "off"
    )
}

/// A flag: the subcommands that it belongs to (none: all of them), and its long name.
type Key = (Vec<String>, String);

/// An argument that a flag conflicts with.
#[derive(Clone, Debug)]
struct Rival {
    id: String,
    /// `None` of positional ones.
    long: Option<String>,
}

/// The files that are looked at, lowest first; whether each is there.
pub type Files = Vec<(PathBuf, bool)>;

/// All layers between what is built in and the command line, merged.
#[derive(Clone, Debug)]
pub struct Layers {
    settings: BTreeMap<Key, Setting>,
    rivals: BTreeMap<Key, Vec<Rival>>,
    /// What was looked at.
    pub files: Files,
    /// What is set and means nothing.
    pub warnings: Vec<String>,
}

impl Layers {
    /// Reads the user's file, the project's, and `named`, then the environment. `command` says which keys there are.
    ///
    /// # Errors
    /// A usage error with place and the nearest key or value for the first mistake; where `named` is not there.
    pub fn read(command: &Command, named: Option<&Path>) -> anyhow::Result<Self> {
        let mut layers = Self::of(command);
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

    /// None yet.
    fn of(command: &Command) -> Self {
        Self {
            settings: BTreeMap::new(),
            rivals: rivals(command),
            files: Files::new(),
            warnings: Vec::new(),
        }
    }

    /// What they say about a flag.
    #[must_use]
    pub fn get(&self, path: &[String], flag: &str) -> Option<&Setting> {
        self.settings.get(&(path.to_vec(), flag.to_owned()))
    }

    /// The flag that is set and leaves no room for this one.
    #[must_use]
    pub fn in_place_of(&self, path: &[String], flag: &str) -> Option<&str> {
        let mut rivals = self.rivals(path, flag).filter_map(|r| r.long.as_deref());
        rivals.find(|rival| self.get(path, rival).is_some_and(|setting| !setting.off))
    }

    fn rivals(&self, path: &[String], flag: &str) -> impl Iterator<Item = &Rival> {
        let rivals = self.rivals.get(&(path.to_vec(), flag.to_owned()));
        rivals.into_iter().flatten()
    }

    /// Takes the word of a layer that is above what is there already. What it conflicts with gives way; if that is of the same
    /// layer it is the error.
    fn set(
        &mut self,
        path: &[String],
        flag: &str,
        setting: Setting,
    ) -> Result<(), (String, Origin)> {
        let rivals: Vec<String> = self
            .rivals(path, flag)
            .filter_map(|r| r.long.clone())
            .collect();
        for rival in rivals.into_iter().filter(|_| !setting.off) {
            let key = (path.to_vec(), rival);
            match self.settings.get(&key) {
                Some(other) if !other.off && other.origin.is_same_layer(&setting.origin) => {
                    return Err((key.1, other.origin.clone()));
                }
                _ => self.settings.remove(&key),
            };
        }
        self.settings
            .insert((path.to_vec(), flag.to_owned()), setting);
        Ok(())
    }

    /// The commands with the layers' values as defaults, but for those that conflict with what was `given` on the command line.
    #[must_use]
    pub fn apply(&self, command: Command, given: &ArgMatches) -> Command {
        self.apply_at(command, given, &mut Vec::new())
    }

    fn apply_at(
        &self,
        mut command: Command,
        given: &ArgMatches,
        path: &mut Vec<String>,
    ) -> Command {
        let flags: Vec<Arg> = flags(&command).cloned().collect();
        for flag in flags {
            let long = flag.get_long().unwrap_or_default();
            let excluded = self
                .rivals(path, long)
                .any(|rival| given.value_source(&rival.id) == Some(ValueSource::CommandLine));
            let setting = self.get(path, long);
            if excluded || switches::is_switched_off(&flag, given) {
                command = command.mut_arg(flag.get_id(), |arg| arg.env(None::<&str>));
            } else if let Some(setting) =
                setting.filter(|setting| !matches!(setting.origin, Origin::OwnVariable(_)))
            {
                let values = setting.values.clone();
                command = command.mut_arg(flag.get_id(), |arg| arg.default_values(values));
            }
        }
        if let Some((name, given)) = given.subcommand()
            && command.find_subcommand(name).is_some()
        {
            path.push(name.to_owned());
            command = command.mut_subcommand(name, |inner| self.apply_at(inner, given, path));
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
                self.set(path, name, Setting::new(flag, values, origin))
                    .map_err(|(rival, _)| {
                        let message = format!(
                            "'{name}' and '{rival}' contradict each other; keep one of them"
                        );
                        file.wrong(key.span(), message)
                    })?;
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
        self.variables(command, command, &variables, &mut Vec::new())?;
        let mut known: Vec<String> = OTHER_VARIABLES.map(str::to_owned).to_vec();
        names_of_variables(command, &mut Vec::new(), &mut known);
        for name in variables.keys() {
            if known.contains(name) || OWN_VARIABLES.contains(&name.as_str()) {
                continue;
            }
            let hint = match nearest(name, known.iter().map(String::as_str)) {
                Some(near) => format!("did you mean {near}?"),
                None => "`optape config --help` says how variables are named".to_owned(),
            };
            self.warnings.push(format!(
                "the variable {name} is unknown and has no effect; {hint}"
            ));
        }
        Ok(())
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
            let origin = Origin::Environment(name);
            self.set_variable(path, flag, text.to_owned(), origin)?;
        }
        // Above all of those; whether their values are right clap says to who uses them.
        for flag in flags(command) {
            let own = flag.get_env().and_then(|name| name.to_str());
            if let Some(name) = own
                && let Some(value) = variables.get(name)
            {
                let text = value.to_string_lossy().into_owned();
                self.set_variable(path, flag, text, Origin::OwnVariable(name.to_owned()))?;
            }
        }
        for inner in command.get_subcommands() {
            path.push(inner.get_name().to_owned());
            self.variables(root, inner, variables, path)?;
            path.pop();
        }
        Ok(())
    }

    fn set_variable(
        &mut self,
        path: &[String],
        flag: &Arg,
        text: String,
        origin: Origin,
    ) -> Result<(), Failure> {
        let setting = Setting::new(flag, vec![text], origin.clone());
        self.set(path, flag.get_long().unwrap_or_default(), setting)
            .map_err(|(_, rival)| {
                Failure::usage(format!(
                    "{origin} and {rival} contradict each other; set one of them"
                ))
            })
    }
}

/// The variable of a flag, after subcommand and flag.
#[must_use]
pub fn variable(path: &[String], long: &str) -> String {
    let words = path.iter().map(String::as_str).chain([long]);
    words.fold("OPTAPE".to_owned(), |name, word| {
        format!("{name}_{}", word.replace('-', "_").to_uppercase())
    })
}

/// The variables of all flags, those that clap reads among them.
fn names_of_variables(command: &Command, path: &mut Vec<String>, all: &mut Vec<String>) {
    all.extend(flags(command).filter_map(|flag| Some(variable(path, flag.get_long()?))));
    let own = command.get_arguments().filter_map(Arg::get_env);
    all.extend(own.filter_map(|name| Some(name.to_str()?.to_owned())));
    for inner in command.get_subcommands() {
        path.push(inner.get_name().to_owned());
        names_of_variables(inner, path, all);
        path.pop();
    }
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

/// The commands without the variables of the flags' own, but the one that names the file: what the command line alone says.
#[must_use]
pub fn without_variables(command: Command) -> Command {
    command
        .mut_args(|arg| match arg.get_long() {
            Some(FILE_FLAG) => arg,
            _ => arg.env(None::<&str>),
        })
        .mut_subcommands(without_variables)
}

/// Which flags conflict with which arguments, in both directions.
fn rivals(command: &Command) -> BTreeMap<Key, Vec<Rival>> {
    fn collect(command: &Command, path: &mut Vec<String>, all: &mut BTreeMap<Key, Vec<Rival>>) {
        for one in command.get_arguments() {
            for other in command.get_arg_conflicts_with(one) {
                for (flag, rival) in [(one, other), (other, one)] {
                    let Some(long) = flag.get_long() else {
                        continue;
                    };
                    let key = (path.clone(), long.to_owned());
                    all.entry(key).or_default().push(Rival {
                        id: rival.get_id().to_string(),
                        long: rival.get_long().map(str::to_owned),
                    });
                }
            }
        }
        for inner in command.get_subcommands() {
            path.push(inner.get_name().to_owned());
            collect(inner, path, all);
            path.pop();
        }
    }
    let mut built = command.clone();
    built.build();
    let mut all = BTreeMap::new();
    collect(&built, &mut Vec::new(), &mut all);
    all
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
        over(Layers::of(&Options::command()), text)
    }

    fn over(mut layers: Layers, text: &str) -> Result<Layers, String> {
        let result = layers.file(&Options::command(), Path::new("/p/optape.toml"), text);
        result.map(|()| layers).map_err(|error| error.to_string())
    }

    fn below(mut layers: Layers, variables: &[(&str, &str)]) -> Result<Layers, String> {
        let variables = variables
            .iter()
            .map(|(name, value)| (name.into(), value.into()));
        let result = layers.environment(&Options::command(), variables);
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
        let read =
            |name: &str, value: &str| below(Layers::of(&Options::command()), &[(name, value)]);
        let layers = read("OPTAPE_REPLAY_FROM_EVENTS", "yes").unwrap();
        assert_eq!(values(&layers, "replay", "from-events"), ["true"]);
        assert_eq!(
            read("OPTAPE_COLOR", "pink").map(|_| ()).unwrap_err(),
            "OPTAPE_COLOR: 'pink' is no value of 'color'; known: auto, always, never"
        );
        assert!(read("OPTAPE_REPLAY_STRICT", "perhaps").is_err());
        // A flag's own variable is clap's: it says whether the value is right.
        let layers = read("OPTAPE_STATS", "nonsense").unwrap();
        assert_eq!(values(&layers, "record", "stats"), ["nonsense"]);
        assert_eq!(layers.settings.len(), 1);
    }

    #[test]
    fn what_a_layer_says_takes_out_what_conflicts_below() {
        let stats_and_level = |layers: &Layers| {
            let of = |flag| values(layers, "record", flag).concat();
            (of("stats"), of("level"))
        };
        let is = |stats: &str, level: &str| (stats.to_owned(), level.to_owned());
        let level = || read("[record]\nlevel = \"full\"\n").unwrap();
        let stats = || read("[record]\nstats = \"none\"\n").unwrap();
        assert_eq!(stats_and_level(&level()), is("", "full"));
        let both = below(level(), &[("OPTAPE_RECORD_STATS", "all")]).unwrap();
        assert_eq!(stats_and_level(&both), is("all", ""));
        let both = below(stats(), &[("OPTAPE_RECORD_LEVEL", "full")]).unwrap();
        assert_eq!(stats_and_level(&both), is("", "full"));
        assert_eq!(
            both.in_place_of(&["record".to_owned()], "stats"),
            Some("level")
        );
        let own = ("OPTAPE_STATS", "all");
        let both = below(stats(), &[("OPTAPE_RECORD_LEVEL", "full"), own]).unwrap();
        assert_eq!(stats_and_level(&both), is("all", ""));
        // What is off is in nobody's way.
        let replay = below(
            read("[replay]\ncounters = [\"mac\"]\nall = false\n").unwrap(),
            &[("OPTAPE_REPLAY_ALL", "no")],
        );
        assert_eq!(values(&replay.unwrap(), "replay", "counters"), ["mac"]);
    }

    #[test]
    fn contradictions_in_one_layer_are_mistakes() {
        let error = read("[record]\nlevel = \"full\"\nstats = \"all\"\n").unwrap_err();
        assert_eq!(
            error,
            "/p/optape.toml:3:1: 'stats' and 'level' contradict each other; keep one of them"
        );
        let variables = [("OPTAPE_QUIET", "1"), ("OPTAPE_VERBOSE", "1")];
        let error = below(Layers::of(&Options::command()), &variables).unwrap_err();
        assert_eq!(
            error,
            "OPTAPE_VERBOSE and OPTAPE_QUIET contradict each other; set one of them"
        );
    }

    fn warnings(name: &str) -> Vec<String> {
        below(Layers::of(&Options::command()), &[(name, "1")])
            .unwrap()
            .warnings
    }

    #[test]
    fn a_variable_that_means_nothing_gets_a_warning() {
        assert_eq!(
            warnings("OPTAPE_RECORD_FUNCTION"),
            [
                "the variable OPTAPE_RECORD_FUNCTION is unknown and has no effect; did you mean OPTAPE_RECORD_FUNCTIONS?"
            ]
        );
        assert!(
            warnings("OPTAPE_QQQQQQQQQQQQQQQQQQQQQQQQQQQQQQ")[0].contains("optape config --help")
        );
        for known in [
            "OPTAPE_RUN",
            "OPTAPE_LOG",
            "OPTAPE_REPLAY_STRICT",
            "OPTAPER",
        ] {
            assert_eq!(warnings(known), [] as [String; 0], "{known}");
        }
    }

    /// Over all sources: what anything here reads from the environment, or puts there, is known.
    #[test]
    fn every_variable_that_the_sources_name_is_known() {
        fn names(place: &Path, all: &mut std::collections::BTreeSet<String>) {
            for entry in std::fs::read_dir(place).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    names(&path, all);
                    continue;
                }
                if !matches!(
                    path.extension().and_then(|e| e.to_str()),
                    Some("rs" | "py" | "cpp")
                ) {
                    continue;
                }
                let text = std::fs::read_to_string(&path).unwrap();
                let quoted = text.split('"').filter(|word| {
                    word.len() > "OPTAPE_".len()
                        && word.starts_with("OPTAPE_")
                        && word
                            .chars()
                            .all(|c| c == '_' || c.is_ascii_uppercase() || c.is_ascii_digit())
                });
                all.extend(quoted.map(str::to_owned));
            }
        }
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut all = std::collections::BTreeSet::new();
        for place in ["recorder", "trace", "replay", "tests", "xtask", "bench"] {
            names(&root.join(place), &mut all);
        }
        assert!(all.contains("OPTAPE_TORCH_VERSIONS"), "{all:?}");
        for name in all {
            assert_eq!(warnings(&name), [] as [String; 0], "{name}");
        }
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
            // Sizes have a least value, intervals a greatest; what is selected of modules has a colon, a range of steps dots.
            let values = match flag.get_action() {
                ArgAction::SetTrue => vec!["true".to_owned()],
                ArgAction::Count => vec!["1".to_owned()],
                _ => match known.first() {
                    Some(value) => vec![format!("\"{}\"", value.get_name())],
                    None => ["1048576", "1", "1s", "LIFNode:v", "1..2"]
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
