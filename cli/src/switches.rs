//! `--no-X` for every switch `--X`: what a configuration file or a variable has switched on can be switched off on the command line.
//!
//! Nothing here knows a flag by name, as in [`crate::layers`], which leaves out the layers' word where the command line has one. Of a switch
//! and its opposite the later one counts.

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};

/// The opposite of a switch; `None` for flags that are none.
#[must_use]
pub fn opposite(flag: &Arg) -> Option<String> {
    let long = flag.get_long()?;
    matches!(flag.get_action(), ArgAction::SetTrue).then(|| format!("no-{long}"))
}

/// The commands with the opposites of all their switches. They are hidden: help says once that they are there.
#[must_use]
pub fn with_opposites(mut command: Command) -> Command {
    let switches: Vec<(Arg, String)> = command
        .get_arguments()
        .filter_map(|flag| Some((flag.clone(), opposite(flag)?)))
        .collect();
    for (flag, name) in switches {
        command = command
            .mut_arg(flag.get_id(), |flag| flag.overrides_with(name.clone()))
            .arg(
                Arg::new(name.clone())
                    .long(name)
                    .action(ArgAction::SetTrue)
                    .global(flag.is_global_set())
                    .overrides_with(flag.get_id())
                    .hide(true),
            );
    }
    let inner: Vec<String> = command
        .get_subcommands()
        .map(|inner| inner.get_name().to_owned())
        .collect();
    for name in inner {
        command = command.mut_subcommand(name, with_opposites);
    }
    command
}

/// Whether the opposite of a switch is on the command line.
#[must_use]
pub fn is_switched_off(flag: &Arg, given: &ArgMatches) -> bool {
    opposite(flag).is_some_and(|name| {
        let source = given
            .try_contains_id(&name)
            .is_ok()
            .then(|| given.value_source(&name));
        source.flatten() == Some(ValueSource::CommandLine)
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::options::Options;

    #[test]
    fn the_later_of_a_switch_and_its_opposite_counts() {
        let functions = |words: &[&str]| {
            let words = ["optape", "record"].iter().chain(words).chain(&["--", "x"]);
            let matches = with_opposites(Options::command()).get_matches_from(words);
            let (_, record) = matches.subcommand().unwrap();
            record.get_flag("functions")
        };
        assert!(functions(&["--functions"]));
        assert!(!functions(&["--functions", "--no-functions"]));
        assert!(functions(&["--no-functions", "--functions"]));
        assert!(!functions(&["--no-functions"]));
    }

    /// clap asserts that no two flags of a command have one name.
    #[test]
    fn no_opposite_is_in_the_way_of_a_flag() {
        with_opposites(Options::command()).debug_assert();
    }
}
