//! Plans as TOML files. Keys that are not known are errors, and every value has a bound.
//!
//! | key | meaning | values |
//! |---|---|---|
//! | `seed` | decides all that is random | 1 unless given |
//! | `size_mib` | size of the blob | 1/64 to 1048576 |
//! | `degree` | connections that each node wants, and opens at random until it has them | 1 to 128; 16 unless given |
//! | `degree_max` | connections beyond which it accepts no more | `degree` to 256; half as many again as `degree` unless given |
//! | `processors_mbit` | what shared processors move for all nodes together | more than 0 to 1000000; not shared unless given |
//! | `publisher_dies` | the publisher leaves once the others hold a full copy between them | `false` unless given |
//! | `give_up_s` | virtual time after which a run ends in any case | more than 0 to 1000000; ten times the least time and a minute unless given |
//! | `[[group]]` | equal nodes; the first group has one publisher | 1 to 32 groups, 100000 nodes |
//! | `group.name` | what reports call it | up to 32 characters |
//! | `group.role` | `"publisher"` holds the blob at the start, `"puller"` wants it | |
//! | `group.manner` | `"honest"`, `"stalls"`, `"drips"`, `"refuses"`, `"corrupts"` | `"honest"` unless given |
//! | `group.count` | how many | 1 to 100000; 1 unless given |
//! | `group.up_mbit`, `down_mbit` | rates of each one's link | 0.01 to 1000000 |
//! | `group.latency_ms` | delay of each one's link, one way | 0 to 10000 |
//! | `group.join_s` | when they come | 0 to 100000; 0 unless given |
//! | `group.site` | name of their site | |
//! | `[[site]]` | a place whose nodes reach other sites through one shaped link; if there are sites, each group has one | up to 32 |
//! | `site.name`, `up_mbit`, `down_mbit`, `latency_ms` | the site, and its link | as for groups |
//! | `churn.fraction` | part of the honest pullers that is killed, each once | 0 to 1 |
//! | `churn.from_s`, `until_s` | when, at random | 0 to 100000 |
//! | `churn.away_s` | how long each is away; it comes back with what it had committed | 0.001 to 100000 |
//! | `sweep.group`, `sweep.count` | one run for each of these counts of one group | up to 32 counts |

use std::time::Duration;

use serde::Deserialize;
use thiserror::Error;

use crate::plan::{Churn, Link, Manner, Member, Plan, Site};

const MAX_GROUPS: usize = 32;
const MAX_NODES: usize = 100_000;
const MAX_SITES: usize = 32;
const MAX_SWEEP: usize = 32;
const MAX_NAME: usize = 32;
const MAX_DEGREE: usize = 128;
/// The scheduler takes no more peers.
const MAX_CONNECTIONS: usize = 256;
/// Longest plan, in bytes.
pub const MAX_LEN: usize = 1 << 16;

/// Why a plan is refused.
#[derive(Debug, Error)]
pub enum PlanError {
    /// It is longer than a plan may be.
    #[error("the plan has {0} bytes; at most {MAX_LEN} may be")]
    TooLong(usize),
    /// It is not TOML, or a key is not known, lacks or has a value of another kind.
    #[error(transparent)]
    Syntax(#[from] toml::de::Error),
    /// A value is out of its bounds.
    #[error("{key} = {value}: it must be {bounds}")]
    Bounds {
        /// The key, with its table.
        key: String,
        /// The value.
        value: String,
        /// What would be right.
        bounds: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default = "one")]
    seed: u64,
    size_mib: f64,
    degree: Option<usize>,
    degree_max: Option<usize>,
    processors_mbit: Option<f64>,
    #[serde(default)]
    publisher_dies: bool,
    give_up_s: Option<f64>,
    group: Vec<Group>,
    #[serde(default)]
    site: Vec<SiteEntry>,
    churn: Option<ChurnEntry>,
    sweep: Option<Sweep>,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Role {
    Publisher,
    Puller,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Group {
    name: String,
    role: Role,
    #[serde(default = "honest")]
    manner: Manner,
    #[serde(default = "one_node")]
    count: usize,
    up_mbit: f64,
    down_mbit: f64,
    latency_ms: f64,
    #[serde(default)]
    join_s: f64,
    site: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SiteEntry {
    name: String,
    up_mbit: f64,
    down_mbit: f64,
    latency_ms: f64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ChurnEntry {
    fraction: f64,
    from_s: f64,
    until_s: f64,
    away_s: f64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Sweep {
    group: String,
    count: Vec<usize>,
}

fn one() -> u64 {
    1
}

fn one_node() -> usize {
    1
}

fn honest() -> Manner {
    Manner::Honest
}

fn check<T: PartialOrd + std::fmt::Display>(
    key: &str,
    value: T,
    (least, most): (T, T),
) -> Result<T, PlanError> {
    // Written so that what is no number fails too.
    if value >= least && value <= most {
        return Ok(value);
    }
    let bounds = format!("from {least} to {most}");
    Err(wrong(key, value, &bounds))
}

fn wrong(key: &str, value: impl std::fmt::Display, bounds: &str) -> PlanError {
    PlanError::Bounds {
        key: key.into(),
        value: value.to_string(),
        bounds: bounds.into(),
    }
}

fn link(table: &str, up: f64, down: f64, latency: f64) -> Result<Link, PlanError> {
    Ok(Link::new(
        check(&format!("{table}.up_mbit"), up, (0.01, 1e6))?,
        check(&format!("{table}.down_mbit"), down, (0.01, 1e6))?,
        check(&format!("{table}.latency_ms"), latency, (0.0, 10_000.0))?,
    ))
}

fn seconds(key: &str, value: f64, bounds: (f64, f64)) -> Result<Duration, PlanError> {
    check(key, value, bounds).map(Duration::from_secs_f64)
}

/// The plan in a file, or, where it sweeps, all of its plans.
pub fn parse(name: &str, text: &str) -> Result<Vec<Plan>, PlanError> {
    if text.len() > MAX_LEN {
        return Err(PlanError::TooLong(text.len()));
    }
    let file: File = toml::from_str(text)?;
    check("number of groups", file.group.len(), (1, MAX_GROUPS))?;
    check("number of sites", file.site.len(), (0, MAX_SITES))?;
    let Some(sweep) = &file.sweep else {
        return Ok(vec![file.plan(name.into(), None)?]);
    };
    let swept = file.group.iter().position(|g| g.name == sweep.group);
    let swept = swept.ok_or_else(|| wrong("sweep.group", &sweep.group, "the name of a group"))?;
    check("number of sweep.count", sweep.count.len(), (1, MAX_SWEEP))?;
    let plan = |&count: &usize| {
        let name = format!("{name}: {count} {}", sweep.group);
        file.plan(name, Some((swept, count)))
    };
    sweep.count.iter().map(plan).collect()
}

impl File {
    fn plan(&self, name: String, swept: Option<(usize, usize)>) -> Result<Plan, PlanError> {
        let degree = check("degree", self.degree.unwrap_or(16), (1, MAX_DEGREE))?;
        let degree_max = self.degree_max.unwrap_or(degree + degree.div_ceil(2));
        let mut members = Vec::new();
        for (at, group) in self.group.iter().enumerate() {
            let count = match swept {
                Some((swept, count)) if swept == at => count,
                _ => group.count,
            };
            check("group.count", count, (1, MAX_NODES - members.len()))?;
            members.extend(std::iter::repeat_n(self.member(at, group)?, count));
        }
        if self.group[0].role != Role::Publisher {
            return Err(wrong(
                "group.role",
                "puller",
                "publisher in the first group",
            ));
        }
        if !members.iter().any(Member::pulls) {
            return Err(wrong(
                "group.role",
                "publisher",
                "puller, and honest, in one group at least",
            ));
        }
        let mut plan = Plan {
            name,
            seed: self.seed,
            size: (check("size_mib", self.size_mib, (1.0 / 64.0, f64::from(1 << 20)))?
                * f64::from(1 << 20)) as u64,
            groups: self.group.iter().map(|group| group.name.clone()).collect(),
            members,
            degree,
            degree_max: check("degree_max", degree_max, (degree, MAX_CONNECTIONS))?,
            processors: self
                .processors_mbit
                .map(|mbit| check("processors_mbit", mbit, (0.01, 1e6)))
                .transpose()?
                .map(|mbit| mbit * 1e6 / 8.0),
            publisher_dies: self.publisher_dies,
            churn: self.churn.as_ref().map(ChurnEntry::churn).transpose()?,
            sites: self
                .site
                .iter()
                .map(SiteEntry::site)
                .collect::<Result<_, _>>()?,
            give_up: Duration::ZERO,
        };
        let give_up = self
            .give_up_s
            .unwrap_or((10.0 * plan.bound() + 60.0).min(1e6));
        plan.give_up = seconds("give_up_s", give_up, (0.001, 1e6))?;
        Ok(plan)
    }

    fn member(&self, at: usize, group: &Group) -> Result<Member, PlanError> {
        if group.name.is_empty() || group.name.chars().count() > MAX_NAME {
            let bounds = format!("1 to {MAX_NAME} characters long");
            return Err(wrong("group.name", &group.name, &bounds));
        }
        let seeds = group.role == Role::Publisher;
        if seeds && group.manner != Manner::Honest {
            return Err(wrong("group.manner", "another", "honest for a publisher"));
        }
        let site = match &group.site {
            None if self.site.is_empty() => None,
            None => {
                return Err(wrong(
                    "group.site",
                    "nothing",
                    "the name of a site, as there are sites",
                ));
            }
            Some(name) => {
                let at = self.site.iter().position(|site| site.name == *name);
                Some(at.ok_or_else(|| wrong("group.site", name, "the name of a site"))?)
            }
        };
        Ok(Member {
            link: link("group", group.up_mbit, group.down_mbit, group.latency_ms)?,
            manner: group.manner,
            seeds,
            joins: seconds("group.join_s", group.join_s, (0.0, 1e5))?,
            site,
            group: at,
        })
    }
}

impl SiteEntry {
    fn site(&self) -> Result<Site, PlanError> {
        Ok(Site {
            name: self.name.clone(),
            link: link("site", self.up_mbit, self.down_mbit, self.latency_ms)?,
        })
    }
}

impl ChurnEntry {
    fn churn(&self) -> Result<Churn, PlanError> {
        let from = check("churn.from_s", self.from_s, (0.0, 1e5))?;
        Ok(Churn {
            fraction: check("churn.fraction", self.fraction, (0.0, 1.0))?,
            from: Duration::from_secs_f64(from),
            until: seconds("churn.until_s", self.until_s, (from, 1e5))?,
            away: seconds("churn.away_s", self.away_s, (0.001, 1e5))?,
        })
    }
}
