//! `csvctl cluster rotate-certificates`.

use std::time::Duration;

use api::Error;
use api::pb::RotateCertificatesRequest;
use clap::Args;

use crate::context::Context;
use crate::units;

#[derive(Debug, Args)]
pub(crate) struct RotateCertificates {
    /// How long older certificates are still taken
    #[arg(long, value_parser = units::parse_duration, value_name = "TIME", default_value = "2m")]
    grace: Duration,
}

impl RotateCertificates {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let grace_ms = u64::try_from(self.grace.as_millis()).unwrap_or(u64::MAX);
        let request = RotateCertificatesRequest { grace_ms };
        let renewed = context.client().await?.cluster_rotate_certificates(request).await?.into_inner();
        context.ui.show(&renewed, |renewed| {
            format!(
                "all nodes renew their certificates now; those of before are refused from {} on",
                units::moment(renewed.refused_from_ms)
            )
        })
    }
}
