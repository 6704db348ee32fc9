# Who the nodes of Ray's cluster launcher are. In a file of its own: a run finds what the runs before it applied, and the
# two roles must be told apart by their names in AWS.
mock_provider "aws" {
  mock_resource "aws_iam_role" {
    defaults = { arn = "arn:aws:iam::123456789012:role/mock" }
  }
  mock_resource "aws_kms_key" {
    defaults = { arn = "arn:aws:kms:us-east-1:123456789012:key/mock" }
  }
  mock_resource "aws_s3_bucket" {
    defaults = { arn = "arn:aws:s3:::mock" }
  }
  mock_resource "aws_launch_template" {
    defaults = { id = "lt-0123456789abcdef0", latest_version = 1 }
  }
  override_resource {
    target = aws_iam_role.launched["worker"]
    values = { arn = "arn:aws:iam::123456789012:role/launched-worker" }
  }
}

run "a_launched_worker_may_start_no_machine_and_a_head_only_workers" {
  command = apply

  assert {
    condition     = aws_iam_instance_profile.launched["head"].role != aws_iam_instance_profile.launched["worker"].role
    error_message = "workers are who the head is"
  }
  assert {
    condition     = aws_iam_role_policy.launched_machines.role == aws_iam_role.launched["head"].id && !can(regex("ec2:|iam:", aws_iam_role_policy.launched_bucket["worker"].policy))
    error_message = "a worker may start or end machines"
  }
  assert {
    condition     = length([for statement in jsondecode(aws_iam_role_policy.launched_machines.policy).Statement : statement if contains(flatten([statement.Action]), "iam:PassRole") && statement.Resource == "arn:aws:iam::123456789012:role/launched-worker"]) == 1
    error_message = "a head may start other machines than workers"
  }
  assert {
    condition     = alltrue([for statement in jsondecode(aws_iam_role_policy.launched_machines.policy).Statement : statement.Condition.StringEquals["ec2:ResourceTag/ray-cluster-name"] == [var.name] if contains(flatten([statement.Action]), "ec2:TerminateInstances")])
    error_message = "a head may end machines of others"
  }
}

run "a_head_ends_machines_of_the_named_clusters" {
  command = apply

  variables {
    launcher_clusters = ["tests", "trial"]
  }

  assert {
    condition     = [for statement in jsondecode(aws_iam_role_policy.launched_machines.policy).Statement : statement.Condition.StringEquals["ec2:ResourceTag/ray-cluster-name"] if contains(flatten([statement.Action]), "ec2:TerminateInstances")] == [["tests", "trial"]]
    error_message = "a head may not end what it starts"
  }
}

run "no_cluster_is_no_answer" {
  command = plan

  variables {
    launcher_clusters = []
  }

  expect_failures = [var.launcher_clusters]
}
